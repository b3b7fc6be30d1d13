"""Shared helpers: the command line in this process, small image folders, the files beside the project."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import typer
from PIL import Image

from irgdistill.config import InputSpec

os.environ["IRGDISTILL_CACHE"] = tempfile.mkdtemp(prefix="irgdistill-")
SUPPORT = Path(__file__).resolve().parent
SHARED = SUPPORT.parents[2] / "shared"
OLD = SUPPORT.parent / "data" / "old"
"""Files written by version 0.1."""


def shared(name: str) -> Path:
    """A file that lies beside the project; the test is skipped, with the reason, where it does not."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the project")
    return path


def input_spec(size: int, interpolation: str = "bilinear", crop_pct: float = 1.0) -> InputSpec:
    """Square images, with the mean and standard deviation that most timm networks have."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return InputSpec((size, size), mean, std, interpolation, crop_pct)


def write_plugin(folder: Path) -> Path:
    """The plug-in file in docs/plugins.md that adds the data source `shades/` and the logger `lines`."""
    page = (SUPPORT.parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8").partition("\n## A data source")[2]
    path = folder / "plugin.py"
    path.write_text(page.partition("```python\n")[2].partition("```")[0], encoding="utf-8")
    return path


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


get_command = cache(typer.main.get_command)
"""Builds the command line once: typer would read every signature again for each command."""


def command(*words: object) -> int:
    """Run `irgdistill WORDS…` in this process -> its exit code."""
    from irgdistill.cli.app import main

    argv = mock.patch.object(sys, "argv", ["irgdistill", *map(str, words)])
    with argv, mock.patch("typer.main.get_command", get_command):
        try:
            main()
        except SystemExit as error:
            return int(error.code or 0)
    return 0


@contextmanager
def interrupted(when: Callable[[Any], bool]) -> Iterator[None]:
    """Within, a run gets SIGINT in its first training step before which `when(trainer)` holds."""
    from irgdistill.training.trainer import Trainer

    step = Trainer.train_step

    def watched(self: Trainer, *batch: Any) -> Any:
        if when(self):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *batch)

    with mock.patch.object(Trainer, "train_step", watched):
        yield


def position(trainer: Any) -> int:
    """Batches that a run has trained on."""
    return int(trainer.progress.epoch * trainer.components.batches + trainer.progress.batch)


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


SMALL = ("--input-size", 16, "--workers", 0, "--batch-size", 24, "--set", "runtime.log_every=1", "--seed", 3)
"""Options of a run on `three_colours`."""


def three_colours(root: Path) -> Path:
    """train/ and val/ with three classes of 16×16 images."""
    write_images(root / "train", {"red": 24, "green": 24, "blue": 24})
    write_images(root / "val", {"red": 8, "green": 8, "blue": 8}, seed=1)
    return root


def records(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's metrics."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
