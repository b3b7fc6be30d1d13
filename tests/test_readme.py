"""Every example in README is executed, or, where it needs a download, understood by the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from conftest import Result

from irgdistill.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = [line for block in re.findall(r"```console\n(.*?)```", README, re.S) for line in block.splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
INDENTED = re.findall(r"^    (irgdistill .*)$", README, re.M)


@pytest.mark.slow
def test_console_examples_run_in_order(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(CONSOLE) >= 4
    for line in CONSOLE:
        program, *arguments = shlex.split(line)
        assert program == "irgdistill"
        result = run(*arguments)
        assert result.code == 0, f"{line}\n{result.err}"


@pytest.mark.parametrize("line", INDENTED)
def test_other_commands_are_understood(line: str) -> None:
    command = typer.main.get_command(app)
    name, *arguments = shlex.split(line)[1:]
    command.commands[name].make_context(name, arguments, resilient_parsing=False)  # type: ignore[attr-defined]


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = 0
    for code in PYTHON:
        if "runs/" not in code:  # those need a finished run: tests/test_checkpoint.py loads one in a bare process
            exec(compile(code, "README.md", "exec"), {})
            ran += 1
    assert ran >= 1
