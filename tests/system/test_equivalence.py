"""Nothing gets faster by computing something else: the losses of a seeded run, with and without each short cut."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import command, records
from support.processes import forked

from irgdistill import distill, graph
from irgdistill.models.build import build_network


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Two epochs under a teacher whose batch norms do something; every update is logged."""
    torch.manual_seed(0)
    teacher = build_network("cifar_resnet14_x0_5", num_classes=10).model
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(teacher.state_dict(), path)
    recipe = ("--preset", "quickstart", "--student", "cifar_resnet14_x0_5", "--teacher", "cifar_resnet14_x0_5")
    recipe += ("--teacher-checkpoint", path, "--skip-teacher-check", "--epochs", 2, "--batch-size", 32)
    recipe += ("--set", "data.train_images=224", "--val-fraction", 0.1)
    recipe += ("--set", "runtime.log_every=1", "--set", "runtime.gradient_shares_every=0", "--set", "augment.hflip=0.5")
    return (*recipe, "--device", "cpu", "--method", "irg+kd")


def losses(folder: Path, *options: object) -> torch.Tensor:
    """Total and every raw term at each update (updates, terms), float64.

    Where numbers are rounded otherwise the rate is small: training multiplies any difference.
    """
    assert command("distill", *options, "--output", folder) == 0
    values = [[record["loss"], *record["terms"].values()] for record in records(folder, "train")]
    return torch.tensor(values, dtype=torch.float64)


SLOWLY = ("--lr", 1e-4)


@pytest.fixture(scope="module")
def plain(recipe: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., torch.Tensor]:
    """`plain(*options)`: the losses of the recipe, trained once for all tests."""
    return cache(lambda *options: losses(tmp_path_factory.mktemp("plain") / "run", *recipe, *options))


@pytest.mark.parametrize(
    ("options", "rate", "tolerance"),
    [
        (("--set", "data.image_cache_gib=0"), (), 0.0),
        (("--workers", 1), (), 0.0),
        (("--set", "runtime.fold_batch_norm=false"), SLOWLY, 1e-4),
    ],
)
def test_losses_with_and_without(
    recipe: tuple[object, ...],
    plain: Callable[..., torch.Tensor],
    tmp_path: Path,
    options: tuple[object, ...],
    rate: tuple[object, ...],
    tolerance: float,
) -> None:
    expected, other = plain(*rate), losses(tmp_path / "other", *recipe, *options, *rate)
    assert len(expected) == 14 and expected.shape == other.shape and expected[:, 0].std() > 0
    torch.testing.assert_close(other, expected, rtol=tolerance, atol=tolerance / 10)
    assert tolerance == 0 or not torch.equal(other, expected), "the short cut was not taken"


def test_narrow_maps_in_parts(recipe: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bf16 maps two images at a time, against all at once."""
    options = (*recipe, "--method", "irg+kd+at", "--amp", "bf16", "--set", "losses.attention.fade=1,1")
    whole = losses(tmp_path / "whole", *options)
    monkeypatch.setattr("irgdistill.matching.pooling._MapMean.COPY", 1)
    assert torch.equal(losses(tmp_path / "parts", *options), whole)


def test_shortcuts_by_pooling(recipe: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against slices of every second pixel."""
    options = (*recipe, "--channels-last", *SLOWLY)
    pooled = losses(tmp_path / "pooled", *options)
    taken = []

    def sliced(x: torch.Tensor, size: int, stride: int) -> torch.Tensor:
        taken.append(size)
        return x[:, :, ::stride, ::stride]

    monkeypatch.setattr("torch.nn.functional.avg_pool2d", sliced)
    torch.testing.assert_close(losses(tmp_path / "sliced", *options), pooled, rtol=1e-4, atol=1e-5)
    assert set(taken) == {1}


def test_edges_in_blocks(
    recipe: tuple[object, ...],
    plain: Callable[..., torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against whole matrices and automatic differentiation."""
    blocks = plain(*SLOWLY)

    def whole(student: torch.Tensor, teacher: torch.Tensor, rows: slice, maximum: graph.Maximum) -> torch.Tensor:
        assert rows == slice(0, len(student)), "of one process"
        return graph.relation_loss(graph.edge_matrix(student), graph.edge_matrix(teacher))

    monkeypatch.setattr("irgdistill.graph.edge_loss", whole)
    torch.testing.assert_close(losses(tmp_path / "whole", *recipe, *SLOWLY), blocks, rtol=1e-4, atol=1e-5)


def faults() -> int:
    """Pages of 4 KiB or more that the system gives for twenty tensors of 64 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def around_a_run(caller: str, environment: dict[str, str], output: Path) -> tuple[int, int]:
    """Faults before and after a run in a process that has trained nothing before."""
    os.environ |= environment
    options: dict[str, Any] = {"method": "none", "student": "cifar_resnet14_x0_5", "data": "digits", "device": "cpu"}
    options |= {"epochs": 1, "batch_size": 32, "workers": 0, "input_size": 16}
    before = faults()
    if caller == "python":
        distill(output=output, settings=["data.train_images=64"], **options)
    else:
        words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
        assert command("distill", *words, "--set", "data.train_images=64", "--output", output) == 0
    faults()
    return before, faults()


@pytest.mark.parametrize(
    ("caller", "setting", "kept"),
    [("command", {}, True), ("command", {"MALLOC_TRIM_THRESHOLD_": "100000"}, False), ("python", {}, False)],
)
def test_a_command_on_the_cpu_keeps_freed_memory_and_the_interface_changes_no_process(
    caller: str, setting: dict[str, str], kept: bool, tmp_path: Path
) -> None:
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library has no mallopt")
    before, after = forked(tmp_path, around_a_run, caller, setting, tmp_path / "run")
    assert before > 600
    assert after < 0.1 * before if kept else after > 0.9 * before
