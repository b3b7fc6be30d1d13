"""The documentation builds without a warning, and its examples work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from conftest import Result

from irgdistill.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
INDENTED = [
    pytest.param(line, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, line in enumerate(re.findall(r"^    (irgdistill .*)$", page.read_text(encoding="utf-8"), re.M))
]
CONSOLE = {
    page.stem: [
        line for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.S) for line in block.splitlines()
    ]
    for page in PAGES
}


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stderr
    assert (tmp_path / "site" / "choosing" / "index.html").stat().st_size > 5000


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert len(PAGES) > 8
    for page in PAGES:
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation


@pytest.mark.parametrize("line", INDENTED)
def test_commands_are_understood(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    typer.main.get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, lines in CONSOLE.items() if lines])
def test_console_examples_run_in_order(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in CONSOLE[page]:
        program, *arguments = shlex.split(line)
        assert program == "irgdistill"
        result = run(*arguments)
        assert result.code == 0, f"{line}\n{result.err}"


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    codes = [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]
    ran = [exec(compile(code, "docs", "exec"), {}) for code in codes if "runs/" not in code]
    assert ran
