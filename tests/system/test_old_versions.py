"""Files written by version 0.1 are read, resumed and trained from; the numbers are those version 0.1 gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import OLD, Run, records

TEACHER = ("--teacher-checkpoint", OLD / "teacher" / "last.safetensors")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the files, which a command may change."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def last(folder: Path, kind: str) -> dict[str, Any]:
    return records(folder, kind)[-1]


def test_eval_gives_the_recorded_accuracy(run: Run, old: Path) -> None:
    result = run("eval", old / "finished", "--against", old / "teacher" / "last.safetensors", "--json")
    assert result.code == 0, result.err
    values, recorded = json.loads(result.out), records(old / "finished", "eval")[0]
    assert values["images"] == recorded["images"] == 539
    assert values["top1"] == pytest.approx(recorded["top1"], abs=0.2)
    assert values["loss"] == pytest.approx(recorded["loss"], rel=1e-3)
    assert values["calibration_error"] == pytest.approx(recorded["calibration_error"], abs=0.2)


def test_export_writes_the_same_weights(run: Run, old: Path, tmp_path: Path) -> None:
    result = run("export", old / "finished", "--format", "timm", "--check-images", 8, "--output", tmp_path / "timm")
    assert result.code == 0, result.err
    student = load_file(old / "finished" / "best.safetensors")
    exported = load_file(tmp_path / "timm" / "cifar_resnet14_x0_5.safetensors")
    assert exported.keys() == student.keys() and all(exported[key].equal(student[key]) for key in student)


@pytest.mark.usefixtures("no_figures")
def test_inspect_graph_shows_student_and_teacher(run: Run, old: Path, tmp_path: Path) -> None:
    options = ("--images", 6, "--neighbours", 2, "--workers", 0, "--output", tmp_path / "graphs", "--json")
    result = run("inspect-graph", old / "finished", *TEACHER, *options)
    assert result.code == 0, result.err
    facts = json.loads((tmp_path / "graphs" / "graph.json").read_text())
    assert facts["teacher"]["architecture"] == "cifar_resnet14_x0_5"
    assert [stage["name"] for stage in facts["stages"]] == ["/1", "/2", "/4", "logits"]


def test_an_unfinished_run_is_resumed_to_the_same_end(run: Run, old: Path) -> None:
    """The losses are those of version 0.1 resumed on the same files, whose batch-norm statistics lagged behind."""
    folder = old / "unfinished"
    result = run("distill", "--resume", folder, *TEACHER)
    assert result.code == 0, result.err
    assert "at epoch 1, batch 6 of 10" in result.err
    train, evaluated = records(folder, "train"), last(folder, "eval")
    assert [record["update"] for record in train] == [5, 10]
    assert [record["loss"] for record in train] == pytest.approx([42.32961, 4.311911], rel=0.01)
    assert evaluated["loss"] == pytest.approx(2.238963, rel=0.05)


def test_a_teacher_cache_trains_to_the_same_losses(run: Run, old: Path, tmp_path: Path) -> None:
    """The losses are those of version 0.1 with the same cache."""
    options = ("--data", "digits", "--input-size", 16, "--seed", 1, "--batch-size", 32, "--workers", 0, "--epochs", 1)
    options += ("--set", "data.train_images=320", "--set", "runtime.log_every=1", "--device", "cpu")
    student = ("--student", "cifar_resnet14_x0_5", "--teacher-cache", old / "cache", "--output", tmp_path / "run")
    result = run("distill", *student, *options)
    assert result.code == 0, result.err
    losses = [record["loss"] for record in records(tmp_path / "run", "train")]
    assert len(losses) == 10 and losses[:3] == pytest.approx([34.17953, 67.204, 50.58021], rel=0.01)
