"""Shared helpers: the command line in-process, small image folders, the files beside the project."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["IRGDISTILL_CACHE"] = tempfile.mkdtemp(prefix="irgdistill-")
SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str) -> Path:
    """A file that lies beside the project; the test is skipped, with the reason, where it does not."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the project")
    return path


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`run("distill", "--epochs", 1)` runs the real command in this process."""
    from irgdistill.cli import main

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["irgdistill", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def write_images(root: Path, classes: dict[str, int], size: int = 16, seed: int = 0) -> Path:
    """An ImageFolder of noisy images whose colour tells the class."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 90, (size, size, 3))
            pixels[..., number % 3] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ and val/ with three classes of 16×16 images."""
    write_images(tmp_path / "data" / "train", {"red": 24, "green": 24, "blue": 24})
    write_images(tmp_path / "data" / "val", {"red": 8, "green": 8, "blue": 8}, seed=1)
    return tmp_path / "data"
