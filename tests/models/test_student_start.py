"""Students that start somewhere: pretrained, or from a checkpoint; what is kept, replaced and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support import Run, interrupted
from torch import Tensor

from irgdistill.config.loading import load_config
from irgdistill.io.tensors import save_tensors
from irgdistill.models import checkpoint
from irgdistill.models.build import build_network
from irgdistill.training.setup import prepare

NAME = "cifar_resnet14_x0_5"
CLASSES = ["blue", "green", "red"]
ALONE = ("--method", "none", "--workers", 0, "--batch-size", 24)
STILL = ("--lr", 1e-300, "--warmup-epochs", 0, "--epochs", 1)
"""A rate that is zero in float32."""


def ours(path: Path, classes: list[str], name: str = NAME, **options: Any) -> dict[str, Tensor]:
    """Write a checkpoint of random weights of its own."""
    torch.manual_seed(99)
    network = build_network(name, num_classes=len(classes), **options)
    weights = network.model.state_dict()
    save_tensors(path, weights, {**checkpoint.describe(network, classes), "metrics": {}, "teacher": None})
    return dict(weights)


def same(student: dict[str, Tensor], start: dict[str, Tensor], but: str = "-") -> bool:
    return all(torch.equal(value, start[key]) for key, value in student.items() if not key.startswith(but))


def trained(run_folder: Path) -> dict[str, Tensor]:
    """Without what a forward pass alone changes."""
    weights = load_file(run_folder / "last.safetensors")
    return {key: value for key, value in weights.items() if "running" not in key and "num_batches" not in key}


def built(folder: Path, **student: Any) -> Any:
    flags = {
        "data.source": str(folder),
        "method": "none",
        **{f"student.{key}": value for key, value in student.items()},
    }
    return prepare(load_config(flags=flags))


@pytest.mark.parametrize("form", ["file", "run"])
def test_a_checkpoint_of_ours_names_its_network_and_keeps_its_classifier(
    run: Run, folder: Path, tmp_path: Path, form: str
) -> None:
    start = ours(tmp_path / "best.safetensors", CLASSES, input_size=(24, 24))
    given = tmp_path / "best.safetensors" if form == "file" else tmp_path
    output = tmp_path / "out"
    result = run("distill", "--student-checkpoint", given, "--data", folder, *ALONE, *STILL, "--output", output)
    assert result.code == 0, result.err
    assert f"{NAME} starts from {tmp_path / 'best.safetensors'}\n" in result.err
    assert same(trained(output), start)
    metadata = checkpoint.read_tensors(output / "last.safetensors")[1]
    assert metadata is not None and metadata["input_size"] == [24, 24]


def test_a_classifier_for_other_classes_is_made_anew_and_said(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "seven.safetensors"
    start = ours(path, list("abcdefg"))
    setup = built(folder, checkpoint=path)
    assert setup.start_note.endswith("its classifier is new, for 3 classes instead of 7")
    weights = setup.student.model.state_dict()
    assert same(weights, start, but="fc.") and weights["fc.weight"].shape == (3, 32)
    assert same(built(folder, checkpoint=path).student.model.state_dict(), weights), "by the seed alone"

    start = ours(path, ["x", "y", "z"])
    setup = built(folder, checkpoint=path, name=NAME)
    assert setup.start_note.endswith("its classifier is new, for other classes")
    assert not torch.equal(setup.student.model.state_dict()["fc.weight"], start["fc.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("classes", [3, 5, 0])
def test_plain_weights_of_timm(folder: Path, tmp_path: Path, suffix: str, classes: int) -> None:
    torch.manual_seed(5)
    start = timm.create_model("test_resnet", num_classes=classes).state_dict()
    path = tmp_path / f"plain{suffix}"
    save_file(start, path) if suffix == ".safetensors" else torch.save({"state_dict": start}, path)
    setup = built(folder, name="test_resnet", checkpoint=path)
    weights = setup.student.model.state_dict()
    assert same(weights, start, but="-" if classes == 3 else "fc.") and len(weights["fc.bias"]) == 3
    remade = f"; its classifier is new, for 3 classes instead of {classes or 'none'}"
    assert setup.start_note == f"test_resnet starts from {path}" + ("" if classes == 3 else remade)


@pytest.mark.parametrize("classes", [3, 1000])
def test_pretrained_weights_as_timm_gives_them(run: Run, folder: Path, tmp_path: Path, classes: int) -> None:
    """From a local file in place of the download."""
    torch.manual_seed(5)
    start = timm.create_model("test_resnet", num_classes=classes).state_dict()
    save_file(start, tmp_path / "hub.safetensors")
    overlay = {"file": str(tmp_path / "hub.safetensors"), "num_classes": classes}
    options = ("--student", "test_resnet", "--student-pretrained", "--data", folder, *ALONE, *STILL)
    options += ("--set", "student.args=" + json.dumps({"pretrained_cfg_overlay": overlay}), "--input-size", 32)
    shown = run("distill", *options, "--dry-run")
    assert shown.code == 0 and "pretrained: true" in shown.out
    note = "test_resnet starts from its pretrained weights"
    remade = "; its classifier is new, for 3 classes instead of 1000"
    assert note + (remade if classes == 1000 else "") + "\n" in shown.err
    result = run("distill", *options, "--output", tmp_path / "out")
    assert result.code == 0 and note in result.err, result.err
    assert same(trained(tmp_path / "out"), start, but="-" if classes == 3 else "fc.")


def test_a_run_that_began_needs_its_first_weights_no_more(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it forget what they said of the network: size, mean, arguments."""
    first = tmp_path / "first.safetensors"
    ours(first, list("abcd"), input_size=(24, 24), args={"drop_rate": 0.1}, preprocessing={"mean": (0.5, 0.5, 0.5)})
    options = ("--student-checkpoint", first, "--data", folder, *ALONE, "--epochs", 2)
    assert run("distill", *options, "--output", tmp_path / "whole").code == 0
    with interrupted(lambda trainer: trainer.progress.update == 4):
        assert run("distill", *options, "--output", tmp_path / "parts").code == 130
    first.unlink()
    again = run("distill", "--resume", tmp_path / "parts", "--json")
    assert again.code == 0, again.err
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert same(parts, whole) and list(parts) == list(whole)
    metadata = checkpoint.read_tensors(tmp_path / "parts" / "last.safetensors")[1]
    assert metadata is not None and metadata["mean"] == [0.5, 0.5, 0.5] and metadata["args"] == {"drop_rate": 0.1}
    moved = run("distill", "--resume", tmp_path / "parts", "--student-checkpoint", tmp_path / "other")
    assert moved.code == 2 and "cannot change student.checkpoint" in moved.err


def test_every_method_of_a_comparison_starts_from_the_same_weights(run: Run, folder: Path, tmp_path: Path) -> None:
    start = ours(tmp_path / "start.safetensors", list("abcdefg"))
    ours(tmp_path / "teacher.safetensors", CLASSES)
    options = ("--student-checkpoint", tmp_path / "start.safetensors", "--data", folder, "--workers", 0, *STILL)
    options += ("--teacher-checkpoint", tmp_path / "teacher.safetensors", "--skip-teacher-check", "--batch-size", 24)
    result = run("compare", "--methods", "none,irg+kd", "--seeds", 1, *options, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    alone, taught = (trained(tmp_path / "out" / method / "0") for method in ("none", "irg+kd"))
    assert same(alone, taught) and same(alone, start, but="fc.")
    assert json.loads(result.out)["student"] == NAME


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--student-checkpoint", "first", "--student-pretrained"), "one or the other"),
        (("--student-checkpoint", "first", "--student", "resnet18"), f"holds a {NAME}, not a resnet18"),
        (("--student-checkpoint", "plain"), "does not name its network; give --student (train: --model) too"),
        (("--student-checkpoint", "plain", "--student", "cifar_resnet20"), "they lack layer1.2.conv1.weight"),
        (("--student-checkpoint", "wide", "--student", NAME), "they have extra layer1.2."),
        (("--student-checkpoint", "wide", "--student", "cifar_resnet20_x0_5"), "they differ in shape at conv1.weight"),
        (("--student-checkpoint", "nowhere", "--student", NAME), "no file"),
        (("--student-checkpoint", "state", "--student", NAME), "is the state of a run"),
        (("--student-pretrained", "--student", NAME), f"no pretrained weights of {NAME}"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    run: Run, folder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    weights = ours(tmp_path / "first.safetensors", CLASSES)
    save_file(weights, tmp_path / "plain.safetensors")
    save_file(timm.create_model("cifar_resnet20", num_classes=3).state_dict(), tmp_path / "wide.safetensors")
    save_tensors(tmp_path / "state.safetensors", weights, {"format": 2, "state": {}})
    words = [str(tmp_path / f"{word}.safetensors") if before == "--student-checkpoint" else word
             for before, word in zip(("", *options), options, strict=False)]  # fmt: skip
    result = run("distill", *words, "--data", folder, *ALONE, "--output", tmp_path / "out")
    assert result.code == 2 and message in result.err, result.err
    assert result.err.count("\n") == 1 and not (tmp_path / "out").exists()
