"""Nothing gets faster by computing something else: the losses of a seeded run, with and without each short cut."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import Run

from irgdistill import graph
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
    recipe += ("--teacher-checkpoint", path, "--skip-teacher-check", "--epochs", 2, "--batch-size", 128)
    recipe += ("--set", "runtime.log_every=1", "--set", "runtime.gradient_shares_every=0", "--set", "augment.hflip=0.5")
    return (*recipe, "--device", "cpu", "--method", "irg+kd")


def losses(run: Run, folder: Path, *options: object) -> torch.Tensor:
    """Total and every raw term at each update (updates, terms), float64.

    Where numbers are rounded otherwise the rate is small: training multiplies any difference.
    """
    result = run("distill", *options, "--output", folder)
    assert result.code == 0, result.err
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = [[record["loss"], *record["terms"].values()] for record in records if record["kind"] == "train"]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (("--set", "data.image_cache_gib=0"), 0.0),
        (("--workers", 1), 0.0),
        (("--set", "runtime.fold_batch_norm=false", "--lr", 1e-4), 1e-4),
    ],
)
def test_losses_with_and_without(
    run: Run, recipe: tuple[object, ...], tmp_path: Path, options: tuple[object, ...], tolerance: float
) -> None:
    rate = options[-2:] if "--lr" in options else ()
    plain = losses(run, tmp_path / "plain", *recipe, *rate)
    other = losses(run, tmp_path / "other", *recipe, *options)
    assert len(plain) == 14 and plain.shape == other.shape and plain[:, 0].std() > 0
    torch.testing.assert_close(other, plain, rtol=tolerance, atol=tolerance / 10)
    assert tolerance == 0 or not torch.equal(other, plain), "the short cut was not taken"


def test_narrow_maps_in_parts(
    run: Run, recipe: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bf16 maps two images at a time, against all at once."""
    options = (*recipe, "--method", "irg+kd+at", "--amp", "bf16", "--set", "losses.attention.fade=1,1")
    whole = losses(run, tmp_path / "whole", *options)
    monkeypatch.setattr("irgdistill.matching.pooling._MapMean.COPY", 1)
    assert torch.equal(losses(run, tmp_path / "parts", *options), whole)


def test_shortcuts_by_pooling(
    run: Run, recipe: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against slices of every second pixel."""
    options = (*recipe, "--channels-last", "--lr", 1e-4)
    pooled = losses(run, tmp_path / "pooled", *options)
    taken = []

    def sliced(x: torch.Tensor, size: int, stride: int) -> torch.Tensor:
        taken.append(size)
        return x[:, :, ::stride, ::stride]

    monkeypatch.setattr("torch.nn.functional.avg_pool2d", sliced)
    torch.testing.assert_close(losses(run, tmp_path / "sliced", *options), pooled, rtol=1e-4, atol=1e-5)
    assert set(taken) == {1}


def test_edges_in_blocks(run: Run, recipe: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against whole matrices and automatic differentiation."""
    blocks = losses(run, tmp_path / "blocks", *recipe, "--lr", 1e-4)

    def whole(student: torch.Tensor, teacher: torch.Tensor, rows: slice, maximum: graph.Maximum) -> torch.Tensor:
        assert rows == slice(0, len(student)), "of one process"
        return graph.relation_loss(graph.edge_matrix(student), graph.edge_matrix(teacher))

    monkeypatch.setattr("irgdistill.graph.edge_loss", whole)
    torch.testing.assert_close(losses(run, tmp_path / "whole", *recipe, "--lr", 1e-4), blocks, rtol=1e-4, atol=1e-5)


PAGES = """
import resource, sys, torch
from irgdistill.cli import main
from irgdistill import distill

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

caller, output = sys.argv[1:]
options = {"method": "none", "student": "cifar_resnet14_x0_5", "data": "digits", "device": "cpu", "epochs": 1}
options |= {"batch_size": 32, "workers": 0, "input_size": 16}
before = faults()
if caller == "python":
    distill(output=output, settings=["data.train_images=64"], **options)
else:
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    sys.argv = ["irgdistill", "distill", *words, "--set", "data.train_images=64", "--output", output]
    try:
        main()
    except SystemExit as error:
        assert not error.code
faults()
print(before, faults())
"""


@pytest.mark.parametrize(
    ("caller", "setting", "kept"),
    [("command", {}, True), ("command", {"MALLOC_TRIM_THRESHOLD_": "100000"}, False), ("python", {}, False)],
)
def test_a_command_on_the_cpu_keeps_freed_memory_and_the_interface_changes_no_process(
    caller: str, setting: dict[str, str], kept: bool, tmp_path: Path
) -> None:
    """Counted in pages of 4 KiB or more that the system gives for twenty tensors of 64 MiB."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library has no mallopt")
    command = [sys.executable, "-c", PAGES, caller, str(tmp_path / "run")]
    found = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert before > 600
    assert after < 0.1 * before if kept else after > 0.9 * before
