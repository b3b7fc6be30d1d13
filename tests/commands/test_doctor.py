"""`irgdistill doctor`: what it counts is what a step takes, and what it says follows from that."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Run
from torch import nn

from irgdistill.commands.doctor import report as doctor
from irgdistill.commands.doctor import trial
from irgdistill.commands.doctor.trial import LiveBytes, try_run
from irgdistill.config.loading import load_config
from irgdistill.data.dataset import Images
from irgdistill.training.setup import prepare

PLAN = ("--preset", "quickstart", "--method", "none", "--student", "cifar_resnet14_x0_5")
LARGE = 2**40


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trial, "STEP_SECONDS", 0.05)
    monkeypatch.setattr(trial, "LOADER_SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)


def test_live_bytes_are_those_of_the_tensors_alive() -> None:
    """A linear layer by hand: its output and the ReLU's; after that only what is kept for the backward."""
    layer, x = nn.Linear(100, 50), torch.randn(8, 100)
    output, gradients = 8 * 50 * 4, (100 * 50 + 50) * 4
    with LiveBytes() as live:
        y = layer(x)
        assert (live.now, live.peak) == (output, output)
        y = y.relu()
        assert (live.now, live.peak) == (output, 2 * output), "the layer's output is gone, the ReLU's is needed"
        y.add_(1)
        y = y.view(4, 100)
        assert live.now == output, "nothing new"
        del y
        assert live.now == 0
        layer(x).sum().backward()
        assert live.now == gradients


def test_the_memory_of_a_large_step_follows_from_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """All terms on, with a teacher: what is foretold from at most 32 images is measured at 256."""
    monkeypatch.setattr(trial, "STEP_SECONDS", 60.0)
    flags = {"teacher.name": "cifar_resnet20", "student.name": "cifar_resnet14_x0_5", "optim.ema": 0.9}
    setup = prepare(load_config("quickstart", flags=flags), fetch=False)
    found = try_run(setup, 32, LARGE)
    trainer = trial.build_trainer(setup, trial.RunFolder(Path("none")), trial.Report(quiet=True))
    run = trainer.components
    trial._step(trainer, 2)
    measured = trial._peak(trainer, 256)
    assert found.fixed + 256 * found.per_image == pytest.approx(measured, rel=0.05)
    student, teacher = (trial._size(trial._tensors([network])) for network in (run.student, run.teacher.network))
    assert found.weights == pytest.approx(2 * student + teacher, rel=1e-3), "with the average"
    momentum = sum(p.numel() * 4 for p in run.student.parameters())
    assert found.optimizer == momentum
    assert found.memory(found.largest(10**8)) <= 10**8 < found.memory(found.largest(10**8) + 2)
    assert found.step_images == 32 and found.step_rate > 0 and found.loader_rate > 0


def test_trying_a_run_leaves_its_configuration_alone() -> None:
    setup = prepare(load_config("quickstart", flags={"method": "none", "student.name": "cifar_resnet14_x0_5"}))
    before = setup.config.model_dump()
    try_run(setup, 4, LARGE)
    assert setup.config.model_dump() == before


def test_the_machine_alone(run: Run, tmp_path: Path) -> None:
    values = json.loads(run("doctor", "--json").out)
    assert torch.__version__.startswith(values["versions"]["torch"]) and values["fits"] is True
    assert values["cores"] >= 1 and values["memory"] > 2**20 and values["disk"] > 0
    assert values["extras"]["digits"]["scikit-learn"]
    shown = run("doctor")
    assert shown.code == 0 and "extra digits" in shown.out and "ok:" not in shown.out
    assert not list(tmp_path.iterdir())


def test_a_run_that_fits(run: Run, tmp_path: Path) -> None:
    shown = run("doctor", *PLAN)
    assert shown.code == 0 and "ok: it fits: about" in shown.out, shown.out
    values = json.loads(run("doctor", *PLAN, "--batch-size", 32, "--json").out)
    assert values["batch"] == 32 and values["fits"] and 0 < values["needed"] < values["available"]
    assert values["trial"]["per_image"] > 16 * 16 * 8 * 4, "at least the first map"
    assert values["epoch_seconds"] > 0
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_run_that_does_not_fit_names_the_batch_that_would(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    values = json.loads(run("doctor", *PLAN, "--json").out)
    half = values["needed"] // 2
    monkeypatch.setattr(doctor, "memory", lambda: half)
    shown = run("doctor", *PLAN, "--device", "cpu", "--json")
    refused = json.loads(shown.out)
    assert shown.code == 1 and not refused["fits"] and refused["verdicts"][0]["kind"] == "no"
    text = refused["verdicts"][0]["text"]
    smaller = int(text.split("a batch of ")[1].split()[0])
    assert 2 <= smaller < 64 and "grad_checkpointing=true" in text
    assert run("doctor", *PLAN, "--device", "cpu", "--batch-size", smaller // 2 * 2, "--json").code == 0


def test_no_room_for_the_run_folder_or_for_what_workers_pass_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_room", lambda path: 1000)
    monkeypatch.setattr(doctor, "SHARED", Path("."))
    shown = run("doctor", *PLAN, "--workers", 1)
    assert shown.code == 1
    assert "no: 1 worker may hold 96.0 KiB in shared memory, 1000 B are free: fewer --workers" in shown.out
    assert "no: the run folder may take" in shown.out


def test_a_slow_loader_is_told_how_many_workers_it_takes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Images.__getitems__

    def slow(self: Images, keys: Sequence[int]) -> Any:
        time.sleep(0.1 * len(keys))
        return load(self, keys)

    monkeypatch.setattr(Images, "__getitems__", slow)
    monkeypatch.setattr(doctor, "cores", lambda: 1000)
    shown = run("doctor", *PLAN, "--batch-size", 8, "--json")
    (verdict,) = (v["text"] for v in json.loads(shown.out)["verdicts"] if v["kind"] == "change")
    assert shown.code == 0 and verdict.startswith("data loading takes") and "--workers " in verdict
    monkeypatch.setattr(doctor, "cores", lambda: 1)
    assert "more than there are cores" in run("doctor", *PLAN, "--batch-size", 8, "--workers", 1).out


@pytest.mark.parametrize("method", ["kd", "encoder"])
def test_a_run_without_labels_is_tried_too(run: Run, method: str) -> None:
    shown = run("doctor", *PLAN[:2], *PLAN[4:], "--teacher", "cifar_resnet20", "--no-labels", "--method", method)
    assert shown.code == 0 and "ok: it fits" in shown.out, shown.err


def test_weights_that_cannot_be_fetched_are_said_to_be_untried(run: Run) -> None:
    shown = run("doctor", *PLAN[:2], "--student", "cifar_resnet14_x0_5", "--teacher", "cifar_resnet20")
    assert shown.code == 0 and "ok: it fits" in shown.out
    assert "change: not tried: the teacher's weights; no pretrained weights of cifar_resnet20" in shown.out
    shown = run("doctor", *PLAN, "--student-pretrained")
    assert shown.code == 0 and "change: not tried: the student's weights" in shown.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "quickstart"), "missing --teacher and --student; for example: --teacher resnet50"),
        ((*PLAN, "--batch-size", 5000), "larger than the 899 training images"),
        ((*PLAN, "--gpus", "x"), "--gpus x: expected a number"),
        ((*PLAN, "--gpus", 3), "--batch-size 64 is the batch of all 3 processes"),
        ((*PLAN, "--resume", "x"), "doctor does not take --resume"),
        ((*PLAN, "--student-checkpoint", "nowhere.safetensors"), "no file"),
        (("--studnt", "x"), "did you mean --student"),
    ],
)
def test_what_distill_would_refuse_is_refused(run: Run, options: tuple[object, ...], message: str) -> None:
    result = run("doctor", *options)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


def test_advice_shows_extras_for_users_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [f"nothing-{extra}; extra == '{extra}'" for extra in ("onnx", "dev", "docs")]
    monkeypatch.setattr("irgdistill.commands.doctor.report.requires", lambda _: wanted)
    shown = run("doctor")
    assert shown.code == 0 and "pip install 'irgdistill[onnx]'" in " ".join(shown.out.split())
    assert list(json.loads(run("doctor", "--json").out)["extras"]) == ["onnx"]
