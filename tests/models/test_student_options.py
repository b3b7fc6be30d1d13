"""Options of the student through the command line: checkpointed blocks, sizes, further arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers
import torch
from safetensors.torch import load_file, save_file
from support import Run

from irgdistill.io.tensors import read_metadata
from irgdistill.matching.taps import Tapped
from irgdistill.models.checkpoint import restore

ONE_EPOCH = ("--epochs", 1, "--workers", 0, "--set", "runtime.log_every=1", "--skip-teacher-check")


def random_teacher(name: str, folder: Path, classes: int, **kwargs: Any) -> tuple[object, ...]:
    torch.manual_seed(1)
    path = folder / f"{name}.safetensors"
    save_file(timm.create_model(name, num_classes=classes, **kwargs).state_dict(), path)
    return "--teacher", name, "--teacher-checkpoint", path


def losses(output: Path) -> list[float]:
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize(("name", "size"), [("test_vit", 32), ("test_resnet", 64)])
def test_checkpointed_blocks_train_to_the_same_losses(run: Run, tmp_path: Path, name: str, size: int) -> None:
    teacher = random_teacher("cifar_resnet14_x0_5", tmp_path, 10)
    options = (
        "--preset",
        "quickstart",
        *ONE_EPOCH,
        "--batch-size",
        32,
        "--set",
        "data.train_images=192",
        "--opt",
        "adamw",
        "--lr",
        0.001,
    )
    for switch in ("false", "true"):
        checkpointing = ("--set", f"student.grad_checkpointing={switch}")
        output = ("--student", name, "--input-size", size, "--output", tmp_path / switch)
        result = run("distill", *teacher, *output, *options, *checkpointing, "--method", "mtk")
        assert result.code == 0, result.err
    plain, checkpointed = losses(tmp_path / "false"), losses(tmp_path / "true")
    assert len(plain) > 5 and plain[-1] != plain[0]
    assert checkpointed == pytest.approx(plain, rel=1e-3)
    assert read_metadata(tmp_path / "true" / "last.safetensors") is not None
    weights = [load_file(tmp_path / switch / "last.safetensors") for switch in ("false", "true")]
    assert list(weights[0]) == list(weights[1])


def test_reentrant_checkpointing_is_refused_in_one_line(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", True)  # what TIMM_REENTRANT_CKPT=1 sets at import
    options = ("--data", folder, "--student", "test_vit", "--method", "none", "--output", tmp_path / "run")
    result = run("distill", *options, "--set", "student.grad_checkpointing=true")
    assert result.code == 2 and len(result.err.strip().splitlines()) == 1
    assert "unset TIMM_REENTRANT_CKPT" in result.err and not (tmp_path / "run").exists()


def test_networks_without_checkpointing_are_named(run: Run, folder: Path, tmp_path: Path) -> None:
    options = ("--data", folder, "--student", "vgg11", "--method", "none", "--output", tmp_path / "run")
    result = run("distill", *options, "--set", "student.grad_checkpointing=true")
    assert result.code == 2 and "vgg11 does not support student.grad_checkpointing" in result.err


def test_a_transformer_of_dynamic_size_learns_from_a_teacher_of_fixed_size(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's parameters keep the shape of its own size; each network is fed its own resolution."""
    seen: dict[str, set[tuple[int, ...]]] = {"teacher": set(), "student": set()}
    forward = Tapped.forward

    def watched(self: Tapped, images: torch.Tensor) -> Any:
        handle = self.model.register_forward_pre_hook(
            lambda _module, args: seen["student" if self.training else "teacher"].add(tuple(args[0].shape[-2:]))
        )
        try:
            return forward(self, images)
        finally:
            handle.remove()

    monkeypatch.setattr(Tapped, "forward", watched)
    output = tmp_path / "run"
    teacher = random_teacher("test_vit", tmp_path, 3)
    student = (
        "--student",
        "vit_tiny_patch16_224",
        "--input-size",
        64,
        "--set",
        "student.args={dynamic_img_size: true, depth: 4}",
    )
    result = run("distill", *teacher, *student, *ONE_EPOCH, "--data", folder, "--batch-size", 64, "--output", output)
    assert result.code == 0, result.err
    assert seen["student"] == {(64, 64)} and (160, 160) in seen["teacher"]
    assert len(losses(output)) == 1
    network, metadata = restore(output / "last.safetensors")
    assert metadata is not None and metadata.args == {"dynamic_img_size": True, "depth": 4}
    assert network.input.size == (64, 64)
    assert load_file(output / "last.safetensors")["pos_embed"].shape == (1, 1 + 14 * 14, 192)
    with torch.no_grad():
        assert network.model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    evaluated = run("eval", output, "--json")
    assert evaluated.code == 0 and json.loads(evaluated.out)["images"] == 24
