"""Weights in files that other programs wrote: containers, prefixes, averaged weights, teacher beside student."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import Run
from torch import Tensor, nn

from irgdistill.config.loading import load_config
from irgdistill.errors import UserError
from irgdistill.models import build_teacher, restore
from irgdistill.models.weights import read_weights
from irgdistill.training.setup import prepare

NAME = "cifar_resnet14_x0_5"
State = dict[str, Tensor]


def network(seed: int, name: str = NAME) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, num_classes=3)
    return model.eval()


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def body(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def relative(prefix: str, state: State) -> State:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def logits(model: nn.Module) -> Tensor:
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        result: Tensor = model.eval()(images)
    return result


WANTED, OTHER = network(1), network(2)
ONE = {"zero": torch.zeros(1)}

CONTAINERS: dict[str, Callable[[State, State], Any]] = {
    "plain": lambda w, o: w,
    "timm": lambda w, o: {"state_dict": w, "args": argparse.Namespace(lr=1), "epoch": 3},
    "model_state_dict": lambda w, o: {"model_state_dict": w, "optimizer": {"state": {0: {"exp_avg": o["fc.weight"]}}}},
    "net": lambda w, o: {"net": w, "acc": 93.1},
    "weights": lambda w, o: {"weights": w},
    "module": lambda w, o: {"module": under("module.", w)},
    "deep": lambda w, o: {"state": {"trainer": {"model": w}}, "epoch": 1},
    "numbers beside tensors": lambda w, o: {**w, "epoch": 3},
    "lightning": lambda w, o: {"state_dict": under("model.", w), "hyper_parameters": {"lr": 0.1}, "loops": {"fit": {}}},
    "lightning with a criterion": lambda w, o: {"state_dict": under("net.", w) | under("criterion.", ONE)},
    "backbone": lambda w, o: {"state_dict": under("backbone.", w)},
    "prefixes": lambda w, o: {"model": under("_orig_mod.module.model.", w)},
    "averaged model": lambda w, o: under("module.", w) | {"n_averaged": torch.tensor(5)},
    "dino": lambda w, o: under("teacher.backbone.", w) | under("teacher.head.mlp.", ONE),
    "state_dict_ema": lambda w, o: {"state_dict": o, "state_dict_ema": w},
    "model_ema": lambda w, o: {"model": o, "model_ema": {"module": w}},
    "ema": lambda w, o: {"ema": under("module.", w), "model": under("module.", o)},
    "backbone and head": lambda w, o: {
        "backbone": body(w),
        "head": relative("fc.", w),
        "optimizer": {"head": relative("bn1.", o)},
    },
    "lightning with its own head": lambda w, o: {
        "state_dict": under("model.backbone.", body(w)) | under("model.head.1.", relative("fc.", w))
    },
    "teacher and student with heads": lambda w, o: {
        role: {"backbone": body(weights), "classifier": under("linear.", relative("fc.", weights))}
        for role, weights in (("teacher", o), ("student", w))
    },
    "a dictionary for each module": lambda w, o: {
        name: relative(f"{name}.", w) for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "fc")
    },
    "lightning with ema": lambda w, o: {"state_dict": under("model.", o) | under("ema_model.module.", w)},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_weights_are_found_in_any_container(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "foreign.pth"
    torch.save(CONTAINERS[kind](WANTED.state_dict(), OTHER.state_dict()), path)
    found, metadata = restore(path, NAME)
    assert metadata is None and found.num_classes == 3
    assert torch.equal(logits(found.model), logits(WANTED)) and not torch.equal(logits(WANTED), logits(OTHER))
    assert ("took" in found.note) == ("ema" in kind or "head" in kind)


@pytest.mark.parametrize("apart", [True, False])
def test_teacher_and_student_are_taken_by_role(tmp_path: Path, folder: Path, apart: bool) -> None:
    path = tmp_path / "both.ckpt"
    teacher, student = WANTED.state_dict(), OTHER.state_dict()
    both = {"teacher": under("backbone.", teacher), "student": under("module.backbone.", student)}
    torch.save(both if apart else {"state_dict": under("student.", student) | under("teacher.net.", teacher)}, path)
    config = load_config(flags={"teacher.name": NAME, "teacher.checkpoint": str(path)})
    assert torch.equal(logits(build_teacher(config.teacher).model), logits(WANTED))
    flags = {"data.source": str(folder), "student.name": NAME, "student.checkpoint": str(path)}
    setup = prepare(load_config(flags={**flags, "method": "none"}))
    assert torch.equal(logits(setup.student.model), logits(OTHER))
    places = "student.module.backbone" if apart else "state_dict.student"
    assert f"starts from {path} (took {places} of " in setup.start_note


def test_what_fits_comes_before_its_role(tmp_path: Path) -> None:
    """The student of one distillation is the teacher of the next."""
    path = tmp_path / "both.pth"
    larger = network(3, "cifar_resnet20_x0_5").state_dict()
    torch.save({"teacher": larger, "student": WANTED.state_dict(), "model_ema": larger}, path)
    found = restore(path, NAME, role="teacher")[0]
    assert torch.equal(logits(found.model), logits(WANTED)) and not found.note


def test_a_choice_is_written_to_the_log(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "ema.pth"
    torch.save({"model": OTHER.state_dict(), "model_ema": WANTED.state_dict()}, path)
    options = ("--teacher", NAME, "--teacher-checkpoint", path, "--student", NAME, "--student-checkpoint", path)
    result = run("distill", *options, "--data", folder, "--method", "kd", "--batch-size", 24, "--dry-run")
    assert result.code == 0, result.err
    assert f"{NAME} starts from {path} (took model_ema of model, model_ema)" in result.err
    assert f"{NAME}: took model_ema of model, model_ema in {path}\n" in result.err


def test_the_head_beside_a_backbone_is_named(tmp_path: Path) -> None:
    """Unless several modules could be it, or it is more than a linear layer: then the network has no classifier."""
    weights, path = WANTED.state_dict(), tmp_path / "parts.pth"
    backbone, head = under("backbone.", body(weights)), relative("fc.", weights)
    torch.save({"state_dict": backbone | under("head.", head)}, path)
    assert restore(path, NAME)[0].note == f"{NAME}: took state_dict.backbone with state_dict.head as fc in {path}"
    for more in (
        under("one.", head) | under("two.", head),
        under("head.1.", head) | {"head.0.weight": torch.ones(32)},
        {"temperature": torch.ones(1), "prototypes.weight": torch.ones(3, 32)},
    ):
        torch.save({"state_dict": backbone | more}, path)
        found = restore(path, NAME)[0]
        assert found.num_classes == 0 and not found.note
    with_classes = "test_vit"
    network = timm.create_model(with_classes, num_classes=0)
    torch.save(under("net.", network.state_dict()) | under("probe.", nn.Linear(64, 5).state_dict()), path)
    assert restore(path, with_classes)[0].num_classes == 5


def test_a_dictionary_that_holds_itself_is_searched_once(tmp_path: Path) -> None:
    content: dict[str, Any] = {"net": WANTED.state_dict()}
    content["itself"] = content
    torch.save(content, tmp_path / "loop.pth")
    assert torch.equal(logits(restore(tmp_path / "loop.pth", NAME)[0].model), logits(WANTED))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_network_is_refused_with_the_two_lines_that_help(
    run: Run, folder: Path, tmp_path: Path, zipped: bool
) -> None:
    path = tmp_path / "model.pth"
    torch.save(WANTED, path, _use_new_zipfile_serialization=zipped)
    options = ("--student", NAME, "--data", folder, "--method", "none", "--dry-run")
    refused = run("distill", "--student-checkpoint", path, *options)
    assert refused.code == 2 and refused.err.count("\n") == 1 and "holds Python objects (" in refused.err
    advice = refused.err[refused.err.index("model = torch") : refused.err.index("  (of a dictionary")]
    names: dict[str, Any] = {"torch": torch}
    exec(advice.replace("weights.pth", str(tmp_path / "weights.pth")), names)
    assert torch.equal(logits(restore(tmp_path / "weights.pth", NAME)[0].model), logits(WANTED))


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.zeros(3)])
def test_files_without_weights_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "no.pth")
    with pytest.raises(UserError, match=r"no\.pth does not hold a dictionary of weights$"):
        read_weights(tmp_path / "no.pth")


def test_weights_of_another_network_are_refused_by_their_names(run: Run, folder: Path, tmp_path: Path) -> None:
    options = ("--student", NAME, "--data", folder, "--method", "none", "--dry-run")
    for content, message in (
        ({"net": under("a.", network(1, "cifar_resnet20_x0_5").state_dict())}, "they have extra layer1.2.conv1.weight"),
        ({"net": {"x.y": torch.zeros(1)}}, "they lack conv1.weight"),
    ):
        torch.save(content, tmp_path / "other.pth")
        refused = run("distill", "--student-checkpoint", tmp_path / "other.pth", *options)
        assert refused.code == 2 and message in refused.err and refused.err.count("\n") == 1, refused.err
