"""The teacher before training: preprocessing that is given, normalisations that fit better, the order of classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import SMALL, Run, records

from irgdistill.commands import probe
from irgdistill.config import TeacherConfig
from irgdistill.config.loading import load_config
from irgdistill.models import CheckpointMetadata, build_student, build_teacher, resolve_student
from irgdistill.training.teacher_check import reordered_accuracy

NAME = "cifar_resnet14_x0_5"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="session")
def foreign(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `teacher`, which needs ImageNet's normalisation, as another program saves them."""
    path = tmp_path_factory.mktemp("foreign") / "weights.pth"
    torch.save(load_file(teacher / "best.safetensors"), path)
    return path


def words(foreign: Path, folder: Path, output: Path, *more: object) -> tuple[object, ...]:
    networks = ("--teacher", NAME, "--teacher-checkpoint", foreign, "--teacher-input-size", 16, "--student", NAME)
    return ("distill", *networks, "--data", folder, "--method", "kd", "--epochs", 1, *SMALL, "--output", output, *more)


def test_what_is_given_replaces_a_part_of_the_networks_own(foreign: Path, teacher: Path) -> None:
    given = {"teacher.preprocessing.mean": "0.5", "teacher.preprocessing.crop_pct": 0.9}
    for checkpoint in (foreign, teacher):
        names = {"teacher.name": NAME, "teacher.checkpoint": str(checkpoint)}
        own, other = (
            build_teacher(load_config(flags=names).teacher).input,
            build_teacher(load_config(flags=names | given).teacher).input,
        )
        assert own.mean == tuple(IMAGENET["mean"]) and other.mean == (0.5, 0.5, 0.5)
        assert other.std == own.std == tuple(IMAGENET["std"]) and other.interpolation == own.interpolation
        assert other.crop_pct == 0.9 != own.crop_pct


def test_a_students_checkpoint_keeps_what_is_not_given(teacher: Path) -> None:
    flags = {"student.checkpoint": str(teacher), "student.preprocessing.std": "0.1,0.2,0.3"}
    student = build_student(resolve_student(load_config(flags=flags).student), ["a", "b"])[0]
    assert student.input.mean == tuple(IMAGENET["mean"]) and student.input.std == (0.1, 0.2, 0.3)


def test_a_normalisation_that_is_far_better_is_named(run: Run, foreign: Path, folder: Path, tmp_path: Path) -> None:
    advice = "it reaches top-1 100.0 with ImageNet's normalisation, and {} with its own, on 24 images; give "
    advice += "--teacher-mean 0.485,0.456,0.406 --teacher-std 0.229,0.224,0.225"
    wrong = words(foreign, folder, tmp_path / "wrong", "--teacher-mean", "1,0,1")
    refused = run(*wrong)
    assert refused.code == 2 and f"chance is 33.3: {advice.format('33.3')}; --skip" in refused.err
    warned = run(*words(foreign, folder, tmp_path / "run", "--teacher-mean", 0.2, "--teacher-std", 0.225))
    assert warned.code == 0 and f"teacher {NAME}: {advice.format('66.7')}\n" in warned.err.replace("\n  ", " ")
    right = run(*words(foreign, folder, tmp_path / "right", *advice.partition("give ")[2].split()))
    assert (
        right.code == 0 and "it reaches" not in right.err and records(tmp_path / "right", "teacher")[0]["top1"] == 100
    )


def test_a_run_and_its_student_remember_what_was_given(
    run: Run, no_figures: None, foreign: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    given = ("--teacher-mean", 0.5, "--teacher-std", "0.2,0.25,0.3", "--student-mean", 0.4)
    assert run(*words(foreign, folder, output, *given)).code == 0
    metadata = CheckpointMetadata.read(output / "last.safetensors")
    assert metadata is not None and metadata.teacher is not None and metadata.mean == (0.4, 0.4, 0.4)
    assert metadata.teacher.preprocessing == {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.25, 0.3]}
    state = (output / "config.yaml").read_text()
    assert "0.25" in state
    probed: list[TeacherConfig] = []
    monkeypatch.setattr(probe, "build_teacher", lambda spec: probed.append(spec) or build_teacher(spec))
    assert run("eval", output, "--probe", "knn", "--workers", 0).code == 0
    assert probed[0].preprocessing.given == {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.25, 0.3)}
    seen = {}
    for name, more in (("own", ()), ("other", ("--teacher-mean", 0.1))):
        result = run("inspect-graph", output, "--images", 6, "--neighbours", 2, "--output", tmp_path / name, *more)
        assert result.code == 0, result.err
        seen[name] = load_file(tmp_path / name / "graph.safetensors")
    assert any(not torch.equal(seen["own"][key], seen["other"][key]) for key in seen["own"] if "teacher" in key)
    assert all(torch.equal(seen["own"][key], seen["other"][key]) for key in seen["own"] if "student" in key)


def test_weights_are_evaluated_as_they_were_trained(run: Run, foreign: Path, folder: Path) -> None:
    options = ("eval", NAME, "--checkpoint", foreign, "--data", folder, "--json")
    assert json.loads(run(*options, "--input-size", 16).out)["top1"] == 100
    options += ("--against", NAME, "--against-checkpoint", foreign, "--mean", "1,0,1", "--std", 0.2)
    wrong = json.loads(run(*options).out)
    assert round(wrong["top1"]) == 33 and wrong["agreement"] < 100 and wrong["kl"] > 1
    same = json.loads(run(*options, "--teacher-mean", "1,0,1", "--teacher-std", 0.2).out)
    assert same["agreement"] == 100 and same["kl"] == 0


def test_a_cache_knows_its_preprocessing(run: Run, foreign: Path, folder: Path, tmp_path: Path) -> None:
    _, *options = words(foreign, folder, tmp_path / "cache", "--set", "augment.hflip=0", "--teacher-mean", 0.5)
    assert run("cache-teacher", *options).code == 0
    manifest = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert manifest["teacher"]["mean"] == [0.5, 0.5, 0.5] and manifest["teacher"]["std"] == IMAGENET["std"]
    train = ("distill", "--teacher-cache", tmp_path / "cache", "--student", NAME, "--data", folder, "--method", "kd")
    train = (*train, "--epochs", 1, *SMALL, "--set", "augment.hflip=0", "--dry-run")
    for more in ((), ("--teacher-mean", 0.5)):
        assert run(*train, *more).code == 0
    for more in (
        ("--teacher-mean", 0.4),
        ("--teacher", NAME, "--teacher-checkpoint", foreign, "--teacher-input-size", 16),
    ):
        refused = run(*train, *more)
        assert refused.code == 2 and "was made of another teacher: mean " in refused.err


def test_the_best_order_is_measured_on_other_images() -> None:
    torch.manual_seed(0)
    labels = torch.arange(10).repeat_interleave(20)[torch.randperm(200)]
    assert reordered_accuracy(labels, labels) == reordered_accuracy(labels, (3 * labels + 1) % 10) == 100
    assert reordered_accuracy(labels, torch.randint(10, (200,))) < 20
    assert reordered_accuracy(labels, torch.zeros_like(labels)) == 10
    assert reordered_accuracy(torch.arange(1000), torch.randperm(1000)) == 0
