"""Networks of different shapes share a crop that covers both, in every command that feeds two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import command

from irgdistill.commands import cache_teacher, evaluate
from irgdistill.commands.compare import table
from irgdistill.commands.inspect import run as inspect
from irgdistill.config.input_spec import InputSpec
from irgdistill.config.loading import load_config
from irgdistill.io.run_folder import RunFolder
from irgdistill.io.tensors import save_tensors
from irgdistill.models.build import build_network
from irgdistill.models.checkpoint import describe
from irgdistill.training.setup import prepare

NAME, CLASSES = "cifar_resnet14_x0_5", ["blue", "green", "red"]
TALL, WIDE, BOTH = (64, 32), (32, 96), (64, 96)


class Cropped(Exception):
    """A command asked for images of this size."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        [found] = [argument for argument in arguments if isinstance(argument, InputSpec)]
        self.size = found.size


@pytest.fixture
def networks(tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoints of a teacher for tall images and a student for wide ones."""
    paths = tmp_path / "tall.safetensors", tmp_path / "wide.safetensors"
    for path, size in zip(paths, (TALL, WIDE), strict=True):
        network = build_network(NAME, num_classes=3, input_size=size)
        save_tensors(path, network.model.state_dict(), describe(network, CLASSES))
    return paths


def crop_of(module: Any, function: str, *words: object) -> tuple[int, int]:
    """The size of the images that a command asks for; it ends there."""

    def stop(*arguments: Any, **options: Any) -> None:
        raise Cropped(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cropped) as caught:
        patch.setattr(module, function, stop)
        if callable(words[0]):
            words[0]()
        else:
            command(*words)
    return caught.value.size


def options(teacher: Path, folder: Path) -> tuple[object, ...]:
    sizes = ("--teacher-input-size", "64x32", "--input-size", "32x96")
    return ("--teacher-checkpoint", teacher, "--student", NAME, *sizes, "--data", folder, "--workers", 0)


def test_distill(networks: tuple[Path, Path], folder: Path) -> None:
    flags = {"teacher.checkpoint": networks[0], "student.name": NAME, "data.source": str(folder), "method": "kd"}
    config = load_config(flags={**flags, "teacher.input_size": "64x32", "student.input_size": "32x96"})
    assert prepare(config).crop.size == BOTH


def test_evaluate_against_a_teacher(networks: tuple[Path, Path], folder: Path) -> None:
    teacher, student = networks
    words = ("eval", student, "--against", teacher, "--data", folder, "--workers", 0)
    assert crop_of(evaluate, "eval_loader", *words) == BOTH


def test_inspect_graph(networks: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    words = ("inspect-graph", *options(networks[0], folder), "--output", tmp_path / "graphs")
    assert crop_of(inspect, "eval_loader", *words) == BOTH


def test_cache_teacher(networks: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    words = ("cache-teacher", *options(networks[0], folder), "--output", tmp_path / "cache")
    assert crop_of(cache_teacher, "train_images", *words) == BOTH


def test_compare(networks: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    teacher, student = networks
    run = RunFolder(tmp_path)
    student.rename(run.last)
    run.summary.write_text('{"epochs": 1, "seconds": 1, "images_per_second": 1, "top1": 50, "last_top1": 50}')
    config = load_config(flags={"teacher.checkpoint": teacher, "student.name": NAME, "data.source": str(folder)})
    runs = [table.Run(config, run)]
    assert crop_of(table, "eval_loader", lambda: table.write_table(tmp_path, runs, jobs=1)) == BOTH
