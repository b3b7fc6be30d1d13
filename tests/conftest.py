"""Fixtures of all tests."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

# Float32 for `--amp auto` on every CPU: without its bf16 instructions. oneDNN reads this when it computes first.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

from support import SMALL, Result, Run, command, three_colours

from irgdistill.commands import outcome

outcome.SECONDS = 0.001  # the table at the end of a run times a single batch


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("distill", "--epochs", 1)` runs the real command in this process and keeps what it says."""

    def call(*words: object) -> Result:
        capsys.readouterr()
        code = command(*words)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return three_colours(tmp_path / "data")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a network that knows the three colours, trained through the command line."""
    root = tmp_path_factory.mktemp("teacher")
    options = ("--method", "none", "--student", "cifar_resnet14_x0_5", "--epochs", 4, *SMALL)
    assert command("distill", "--data", three_colours(root / "data"), *options, "--output", root / "run") == 0
    assert json.loads((root / "run/summary.json").read_text())["top1"] > 90
    return root / "run"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of `inspect-graph` that look at anything else: drawing is most of the time."""
    from matplotlib.figure import Figure

    empty = lambda *_: Figure(figsize=(1, 1))  # noqa: E731
    for name in ("stage_figure", "transformation_figure", "overview_figure"):
        monkeypatch.setattr(f"irgdistill.commands.inspect.results.{name}", empty)
