"""`irgdistill train`: the run that `distill --method none` makes, under the words of a network on labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import SMALL, Run, interrupted, position, records

from irgdistill.cli.app import commands
from irgdistill.config import options, presets

NAME = "cifar_resnet14_x0_5"


def test_it_is_the_run_without_a_teacher_bit_for_bit(run: Run, folder: Path, tmp_path: Path) -> None:
    shared = ("--data", folder, *SMALL, "--epochs", 1, "--label-smoothing", 0.1)
    trained = run("train", "--model", NAME, *shared, "--output", tmp_path / "train", "--json")
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["folder"] == str(tmp_path / "train")
    assert "student" not in trained.err and "teacher" not in trained.err
    assert run("distill", "--method", "none", "--student", NAME, *shared, "--output", tmp_path / "none").code == 0
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("train", "none"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert set(records(tmp_path / "train", "train")[0]["terms"]) == {"ce"}


def test_its_run_is_resumed_evaluated_exported_and_teaches(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with interrupted(lambda trainer: position(trainer) == 1):
        stopped = run("train", "--model", NAME, "--data", folder, *SMALL, "--epochs", 2, "--output", output)
    assert stopped.code == 130
    assert run("train", "--resume", output).code == 0
    top1 = json.loads((output / "summary.json").read_text())["top1"]
    assert json.loads(run("eval", output, "--json").out)["top1"] == pytest.approx(top1)
    assert run("export", output, "--format", "timm").code == 0
    options = ("--student", NAME, "--data", folder, *SMALL, "--skip-teacher-check")
    taught = run("distill", "--teacher-checkpoint", output, *options, "--epochs", 1, "--output", tmp_path / "student")
    assert taught.code == 0, taught.err


def test_it_starts_from_a_checkpoint(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    words = ("train", "--checkpoint", teacher, "--data", folder, *SMALL, "--epochs", 1, "--lr", 1e-9)
    result = run(*words, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    assert f"{NAME} starts from {teacher / 'best.safetensors'}" in result.err
    assert json.loads((tmp_path / "run/summary.json").read_text())["top1"] > 90
    refused = run(*words, "--output", teacher, "--overwrite")
    assert refused.code == 2 and f"--checkpoint {teacher} lies in --output {teacher}" in refused.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no network: give --model NAME"),
        (("--model", "resnt18"), "unknown model 'resnt18'; did you mean resnet18"),
        (("--model", NAME, "--pretrained", "--checkpoint", "x.pth"), "--pretrained and --checkpoint: a network starts"),
        (("--model", NAME, "--set", "method=kd"), "train has no teacher: leave out --set method=kd"),
        (("--model", NAME, "--set", "losses.kd.weight=1"), "train has no teacher: leave out --set losses.kd.weight=1"),
        (("--model", NAME, "--teacher", NAME), "no option --teacher"),
        (("--resume", "here", "--epochs", 3), "--resume cannot change schedule.epochs"),
    ],
)
def test_mistakes_are_one_line(run: Run, words: tuple[object, ...], message: str) -> None:
    result = run("train", "--data", "digits", *words) if "--resume" not in words else run("train", *words)
    assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1


def test_it_takes_the_recipe_of_every_preset_without_its_teacher(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("irgdistill.commands.distill.start", lambda request, **_: started.append(request))
    for preset in presets():
        result = run("train", "--preset", preset, "--model", NAME, "--data", "digits")
        assert result.code == 0, result.err
        config = started[-1].config
        assert config.method == "none" and not config.uses_teacher
        assert [name for name, weight in config.losses.weights().items() if weight] == ["ce"]
    assert len(started) == len(presets()) > 10


def test_it_has_every_option_of_distill_that_needs_no_teacher() -> None:
    known: dict[str, Any] = {name: command.params for name, command in commands().items()}
    train, distill = ({parameter.name for parameter in known[name]} for name in ("train", "distill"))
    renamed = {"student": "model", "student_pretrained": "pretrained", "student_checkpoint": "checkpoint"}
    renamed |= {f"student_{name}": name for name in ("mean", "std", "interpolation", "crop_pct")}
    left_out = {name for name in distill if renamed.get(name, name) not in train}
    assert train - distill == set(renamed.values())
    keys = {options()[name].key for name in left_out}
    assert all(
        key.startswith(("teacher.", "matching.", "losses.")) or key in {"method", "data.labels", "runtime.graph_scope"}
        for key in keys
    )
    assert "losses.ce.label_smoothing" not in keys


def test_no_epochs_only_evaluate_teacher_and_student(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    start = ("--student-checkpoint", teacher, "--teacher-checkpoint", teacher, "--method", "kd")
    result = run("distill", *start, "--data", folder, *SMALL, "--epochs", 0, "--output", output, "--json")
    assert result.code == 0, result.err
    summary, before = json.loads(result.out), json.loads((teacher / "summary.json").read_text())
    assert summary["epochs"] == summary["epoch"] == 0 and summary["top1"] == pytest.approx(before["top1"])
    assert summary["teacher_top1"] == pytest.approx(before["top1"])
    assert "nothing trained (--epochs 0), top-1" in result.err and not records(output, "train")
    one, other = (load_file(path / "best.safetensors") for path in (output, teacher))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert run("eval", output).code == 0 and run("export", output, "--format", "timm").code == 0
    again = run("distill", "--resume", output)
    assert again.code == 2 and "finished run" in again.err


def test_a_run_ended_by_its_patience_is_finished(run: Run, folder: Path, tmp_path: Path) -> None:
    """No weight moves, so no epoch is better than the first. The end is stopped once, before the summary."""
    output = tmp_path / "run"
    words = ("train", "--model", NAME, "--data", folder, *SMALL, "--epochs", 9, "--lr", 1e-30, "--patience", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("irgdistill.training.trainer.Trainer.finish", lambda self: self.stop(2))
        assert run(*words, "--output", output).code == 130
    resumed = run("train", "--resume", output)
    assert resumed.code == 0 and "stopped early: 2 epochs without a better result than" in resumed.err, resumed.err
    assert json.loads((output / "summary.json").read_text())["epochs"] == len(records(output, "eval"))
    assert "finished run" in run("train", "--resume", output).err


def test_binary_cross_entropy_with_mixup_and_rates_by_layer(run: Run, folder: Path, tmp_path: Path) -> None:
    words = ("train", "--model", NAME, "--data", folder, *SMALL, "--epochs", 1, "--output", tmp_path / "run")
    wrong = run(*words, "--set", "losses.ce.target_threshold=0.2")
    assert wrong.code == 2 and wrong.err.count("\n") == 1 and "target_threshold is for kind = binary" in wrong.err
    options = (
        "losses.ce.kind=binary",
        "losses.ce.target_threshold=0.2",
        "optim.layer_decay=0.8",
        "optim.betas=[0.9,0.95]",
    )
    sets = [word for option in options for word in ("--set", option)]
    result = run(*words, "--opt", "adamw", "--mixup", 0.2, *sets)
    assert result.code == 0, result.err
    assert records(tmp_path / "run", "train")[0]["loss"] == pytest.approx(0.6931, abs=0.3), "log 2 per class at first"
    assert records(tmp_path / "run", "train")[0]["lr"] == pytest.approx(0.75 * 5e-4 * (24 / 512) ** 0.5, rel=0.01)
