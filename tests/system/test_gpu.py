"""A step on a CUDA device is that of the CPU, waits for the device once, and may be recorded as a CUDA graph.

A run that is stopped and resumed there equals one that was not.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import Run
from support.interruption import differences, outcome

from irgdistill import graph
from irgdistill.config.loading import load_config
from irgdistill.errors import UserError
from irgdistill.io.console import Report
from irgdistill.io.run_folder import RunFolder
from irgdistill.models.build import build_network
from irgdistill.training.setup import prepare
from irgdistill.training.trainer import Trainer, build_trainer

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))
METHODS = ("irg+kd+at", "mtk", "logits", "dkd", "fitnet", "at", "fsp", "rkd", "sp", "pkt", "rocket")
METHODS += ("positions", "dist", "wttm", "reviewkd", "srd", "crd")
CUDA = "cuda"


def on_gpu(test: object) -> object:
    for mark in GPU:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(build_network("cifar_resnet20", num_classes=10).model.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def trainer_of(teacher: Path, folder: Path, device: str, method: str = "irg+kd+at", **more: object) -> Trainer:
    flags = {
        "method": method, "teacher.name": "cifar_resnet20", "teacher.checkpoint": teacher,
        "student.name": "cifar_resnet14_x0_5", "student.input_size": 32, "data.source": "digits",
        "data.val_fraction": 0.5, "data.batch_size": 64, "data.workers": 0, "optim.lr": 1e-3,
        "runtime.device": device, "runtime.amp": "none", "runtime.gradient_shares_every": 0,
    }  # fmt: skip
    config = load_config(flags={**flags, **{key.replace("__", "."): value for key, value in more.items()}})
    trainer = build_trainer(prepare(config), RunFolder(folder), Report(quiet=True))
    trainer.components.trained.train()
    return trainer


def batch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images.to(device), torch.randint(0, 10, (64,), generator=generator).to(device)


def steps(trainer: Trainer, count: int) -> torch.Tensor:
    """Total and raw terms of `count` steps on one batch (count, terms)."""
    found = [trainer.train_step(*batch(trainer.components.device)) for _ in range(count)]
    return torch.tensor([[value.item() for value in step.values()] for step in found])


@pytest.mark.parametrize("device", ["cpu", pytest.param(CUDA, marks=GPU)])
@pytest.mark.parametrize("every", [0, 1], ids=["", "shares"])
def test_a_loss_that_is_not_finite_changes_no_weight(teacher: Path, tmp_path: Path, device: str, every: int) -> None:
    trainer = trainer_of(teacher, tmp_path, device, runtime__gradient_shares_every=every)
    trainer.report.record = lambda record: None  # type: ignore[method-assign]
    steps(trainer, 1)
    before = [parameter.detach().clone() for parameter in trainer.components.student.parameters()]
    total = trainer.components.loss.total
    trainer.components.loss.total = lambda raw, weights: total(raw, weights) * torch.inf  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"not finite at update 2, epoch 1 \(total\); the weights were not changed"):
        steps(trainer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.components.student.parameters(), strict=True))
    trainer.components.loss.total = total  # type: ignore[method-assign]
    trainer.components.optimizer.zero_grad()
    steps(trainer, 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, trainer.components.student.parameters(), strict=True))


@on_gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_cpu(teacher: Path, tmp_path: Path, method: str) -> None:
    there, here = (steps(trainer_of(teacher, tmp_path, device, method), 3) for device in (CUDA, "cpu"))
    torch.testing.assert_close(there[0], here[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-3)
    assert (here[2] != here[0]).any()


@on_gpu
@pytest.mark.parametrize("method", METHODS)
def test_nothing_within_a_step_waits_for_the_device(teacher: Path, tmp_path: Path, method: str) -> None:
    """But for the one look at whether the loss is finite, which leaves the backward pass at work."""
    trainer = trainer_of(teacher, tmp_path, CUDA, method, runtime__amp="bf16")
    steps(trainer, 2)
    images, labels = batch(trainer.components.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_are_those_of_eager_ones(teacher: Path, tmp_path: Path, mode: str) -> None:
    eager = steps(trainer_of(teacher, tmp_path, CUDA), 6)
    more = {"runtime__compile": True, "runtime__compile_mode": mode}
    compiled = steps(trainer_of(teacher, tmp_path, CUDA, **more), 6)
    torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-3)


@on_gpu
def test_edges_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graph.BLOCK, CUDA, 2**12)
    torch.manual_seed(0)
    student, teacher = (3 + torch.randn(300, width, dtype=torch.float64) for width in (24, 40))
    losses, gradients = [], []
    for device, dtype in (("cpu", torch.float64), (CUDA, torch.float32)):
        x = student.detach().to(device, dtype, copy=True).requires_grad_()
        loss = graph.edge_loss(x, teacher.to(device, dtype))
        loss.backward()
        assert x.grad is not None
        losses.append(loss.detach().cpu().double())
        gradients.append(x.grad.cpu().double())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max()))


@pytest.mark.parametrize(
    ("device", "amp"),
    [("cpu", "none"), pytest.param(CUDA, "none", marks=GPU), pytest.param(CUDA, "fp16", marks=GPU)],
)
def test_a_resumed_run_equals_one_that_was_not_stopped(
    run: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, amp: str
) -> None:
    """Bit for bit, under deterministic algorithms, with a loader process: stopped in its second epoch of four steps."""
    options = ("--data", "digits", "--student", "cifar_resnet14_x0_5", "--input-size", 32, "--epochs", 2)
    options += ("--batch-size", 32, "--workers", 1, "--device", device, "--amp", amp, "--set", "optim.ema=0.9")
    options += (
        "--set",
        "runtime.deterministic=true",
        "--set",
        "data.train_images=128",
        "--set",
        "data.val_fraction=0.1",
    )
    taught = ("--teacher", "cifar_resnet20", "--teacher-checkpoint", teacher, "--skip-teacher-check")
    begin = ("distill", *options, *taught, "--method", "irg+kd+at", "--output")
    assert run(*begin, tmp_path / "whole").code == 0
    steps_left, train_step = 6, Trainer.train_step

    def counted(*args: Any) -> Any:
        nonlocal steps_left
        steps_left -= 1
        if steps_left == 0:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", counted)
        stopped = run(*begin, tmp_path / "cut")
    assert stopped.code == 128 + signal.SIGTERM and "stopped at epoch 2, batch 2 of 4" in stopped.err
    resumed = run("distill", "--resume", tmp_path / "cut")
    assert resumed.code == 0, resumed.err
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "cut")) == []


@on_gpu
@pytest.mark.slow
def test_a_run_is_trained_and_evaluated(run: Run, teacher: Path, tmp_path: Path) -> None:
    options = ("--preset", "quickstart", "--student", "cifar_resnet14_x0_5", "--epochs", 4, "--device", CUDA)
    taught = ("--teacher", "cifar_resnet20", "--teacher-checkpoint", teacher, "--skip-teacher-check")
    result = run("distill", *options, *taught, "--method", "irg+kd+at", "--output", tmp_path / "run")
    assert result.code == 0, result.err
    top1 = [json.loads(run("eval", tmp_path / "run", "--json", "--device", d).out)["top1"] for d in (CUDA, "cpu")]
    assert top1[0] == pytest.approx(top1[1], abs=0.5) and top1[0] > 15
