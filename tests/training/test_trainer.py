"""The training loop on small fakes: the order of a step, accumulation, signals, and what a bad loss must not do."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irgdistill.config import load_config
from irgdistill.errors import Interrupted, TrainingError, UserError
from irgdistill.matching import Output
from irgdistill.runtime import World
from irgdistill.training import Metrics, Progress, Trainer
from irgdistill.training import trainer as module

Events = list[str]


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.model.weight)

    def forward(self, images: Tensor) -> Output:
        return Output(self.model(images), {})


class Loss:
    """The mean logit, or what `value` says; notes what it is given, and when backward reaches it."""

    def __init__(self, events: Events) -> None:
        self.events, self.value = events, 1.0
        self.batches: list[Any] = []
        self.done: list[float] = []

    def losses(self, batch: Any, progress: float) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        self.batches.append(batch)
        self.done.append(progress)
        raw = batch.student.logits.mean() * self.value
        raw.register_hook(lambda gradient: self.events.append("backward"))
        return 2 * raw, {"kd": raw}, {"kd": 2.0}


class Optimizer(torch.optim.SGD):
    def __init__(self, events: Events, parameters: Any) -> None:
        super().__init__(parameters, lr=0.5)
        self.events = events

    def step(self, closure: Any = None) -> None:
        self.events.append("optimizer")
        super().step()


class Train:
    """Batches of two images; before batch n `before[n]` is called."""

    def __init__(self, count: int) -> None:
        self.count, self.before = count, dict[int, Any]()
        self.epochs: list[tuple[int, int]] = []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self.epochs.append((epoch, start))
        for number in range(start, self.count):
            self.before.get(number, lambda: None)()
            yield torch.ones(2, 1), torch.zeros(2, dtype=torch.long)

    def bottleneck(self, seconds: float, behind: float) -> None:
        return None


class Report:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.lines: list[str] = []

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        yield

    def record(self, values: dict[str, Any]) -> None:
        self.records.append(values)

    def advance(self, *_: Any) -> None: ...
    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None: ...


class Saver:
    """Notes the calls; `due_at` are updates after which it is time to save."""

    def __init__(self, events: Events, progress: Progress) -> None:
        self.events, self.progress, self.due_at = events, progress, set[int]()
        self.error: OSError | None = None
        self.saved, self.resume_command = "the last saved state is epoch 1", "irgdistill distill --resume RUN"

    def due(self) -> bool:
        return self.progress.update in self.due_at

    def save_weights(self, which: str) -> None:
        self.events.append(f"weights {which}")

    def save_state(self) -> None:
        self.events.append(f"state {self.progress.epoch}:{self.progress.batch}")

    def save_summary(self, summary: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        self.events.append("summary")

    def unreadable_of_all(self) -> list[str]:
        return []


class Fixture:
    """A trainer whose components are fakes."""

    def __init__(self, accumulate: int = 1, epochs: int = 1, batches: int = 4, **flags: Any) -> None:
        self.events: Events = []
        self.student, self.loss, self.train = Student(), Loss(self.events), Train(batches)
        events = self.events
        config = load_config(
            flags={"method": "none", "schedule.epochs": epochs, "optim.accumulate": accumulate, **flags}
        )
        self.progress, self.report = Progress(), Report()
        self.saver = Saver(events, self.progress)
        self.components = SimpleNamespace(
            config=config,
            world=World(),
            device=torch.device("cpu"),
            held_out=None,
            setup=SimpleNamespace(
                splits=SimpleNamespace(labelled=True), student=SimpleNamespace(name="student"), teacher=None
            ),
            loss=self.loss,
            student=self.student,
            trained=self.student,
            evaluated=self.student,
            teacher=None,
            mixup=None,
            autocast=nullcontext(),
            optimizer=Optimizer(events, self.student.parameters()),
            scheduler=SimpleNamespace(step_update=lambda update: events.append(f"schedule {update}")),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            ema=SimpleNamespace(update=lambda model, step: events.append(f"average {step}")),
            train=self.train,
            validation=None,
            local_models=[],
            accumulate=accumulate,
            batches=batches,
            updates=epochs * batches // accumulate,
        )
        self.trainer = Trainer(self.components, self.progress, self.saver, self.report)  # type: ignore[arg-type]

    def step(self) -> dict[str, Tensor]:
        return self.trainer.train_step(torch.ones(2, 1), torch.zeros(2, dtype=torch.long))

    @property
    def weight(self) -> float:
        return float(self.student.model.weight.detach())


@pytest.fixture(autouse=True)
def evaluation(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Accuracies that evaluations return, in turn."""
    accuracies = [50.0, 70.0, 60.0]

    def evaluate(*_: Any) -> Metrics:
        return Metrics(
            top1=accuracies.pop(0), top5=90.0, loss=1.0, calibration_error=2.0, images=8, images_per_second=1.0
        )

    monkeypatch.setattr(module, "evaluate", evaluate)
    return accuracies


def test_a_step_runs_backward_then_updates_schedules_and_averages() -> None:
    fixture = Fixture()
    values = fixture.step()
    assert fixture.events == ["backward", "optimizer", "schedule 1", "average 1"]
    assert {name: float(value) for name, value in values.items()} == {"loss": 2.0, "kd": 1.0}
    assert not any(value.requires_grad for value in values.values())
    assert fixture.weight == 0.0, "lr 0.5 times the gradient, 2"
    assert (fixture.progress.batch, fixture.progress.update) == (1, 1)


def test_accumulated_batches_share_one_update_with_their_mean_gradient() -> None:
    fixture = Fixture(accumulate=2)
    fixture.step()
    assert fixture.events == ["backward"] and fixture.weight == 1.0
    fixture.step()
    assert fixture.events == ["backward", "backward", "optimizer", "schedule 1", "average 1"]
    assert fixture.weight == 0.0, "as if both were one batch"
    assert (fixture.progress.batch, fixture.progress.update) == (2, 1)


def test_terms_are_told_the_share_of_the_training_that_is_done() -> None:
    fixture = Fixture(accumulate=2)
    for _ in range(4):
        fixture.step()
    assert fixture.loss.done == [0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_before_the_weights_change(value: float) -> None:
    fixture = Fixture()
    fixture.step()
    fixture.loss.value = value
    fixture.student.model.weight.data.fill_(1.0)
    fixture.events.clear()
    with pytest.raises(UserError, match=r"not finite at update 2, epoch 1 \(kd = (nan|inf)\); the weights were not"):
        fixture.step()
    assert fixture.weight == 1.0 and fixture.events == ["backward"]
    assert (fixture.progress.batch, fixture.progress.update) == (1, 1)


def test_gradients_are_clipped_before_the_update() -> None:
    fixture = Fixture(**{"optim.clip_grad": 0.5})
    fixture.step()
    assert fixture.weight == pytest.approx(1 - 0.5 * 0.5), "the norm of the gradient is 2"


@pytest.mark.parametrize("clip", [None, 0.5])
def test_an_update_that_the_scaler_skips_is_none(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither schedule nor average nor counter advance; the host looks once."""
    fixture, looks = Fixture(**{"optim.clip_grad": clip}), []
    fixture.components.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    overflow = fixture.student.model.weight.register_hook(lambda gradient: gradient * torch.inf)
    with monkeypatch.context() as patch:
        item = Tensor.item
        patch.setattr(Tensor, "item", lambda tensor: (looks.append(tensor), item(tensor))[1])
        fixture.step()
    assert fixture.events == ["backward"] and fixture.weight == 1.0 and len(looks) == 1
    assert (fixture.progress.batch, fixture.progress.update) == (1, 0)
    assert fixture.components.scaler.get_scale() == 4.0
    overflow.remove()
    fixture.step()
    assert fixture.events == [*["backward"] * 2, "optimizer", "schedule 1", "average 1"]
    assert (fixture.progress.batch, fixture.progress.update) == (2, 1)
    assert fixture.weight == pytest.approx(0.0 if clip is None else 1 - 0.5 * clip)


def test_gradients_that_are_never_finite_end_the_run() -> None:
    fixture = Fixture()
    fixture.components.scaler = torch.amp.GradScaler("cpu")
    overflow = fixture.student.model.weight.register_hook(lambda gradient: gradient * torch.nan)
    for _ in range(31):
        fixture.step()
    overflow.remove()
    fixture.step()
    fixture.student.model.weight.register_hook(lambda gradient: gradient * torch.nan)
    for _ in range(31):
        fixture.step()
    with pytest.raises(TrainingError, match=r"update 2 are not finite, 32 times in a row, .*--amp bf16 or none"):
        fixture.step()


def test_the_teacher_gets_the_mixed_images_and_the_rows_of_its_cache() -> None:
    fixture = Fixture()
    asked: list[Any] = []

    def teacher(images: Tensor, rows: Tensor | None) -> list[str]:
        asked.append((images, rows))
        return ["its answer"]

    fixture.components.teacher = teacher
    fixture.components.mixup = lambda images, labels: (images + 1, labels + 3)
    rows = torch.zeros(2, 5, dtype=torch.uint8)
    fixture.trainer.train_step(torch.ones(2, 1), torch.zeros(2, dtype=torch.long), rows)
    images, given = asked[0]
    assert torch.equal(images, torch.full((2, 1), 2.0)) and given is rows
    batch = fixture.loss.batches[0]
    assert batch.teacher == "its answer" and batch.labels.tolist() == [3, 3]
    assert batch.student.logits.flatten().tolist() == [2.0, 2.0]


def test_labels_that_are_not_to_be_used_reach_no_term() -> None:
    fixture = Fixture(**{"data.labels": False})
    fixture.step()
    assert fixture.loss.batches[0].labels is None


def test_an_epoch_ends_with_weights_before_the_state(evaluation: list[float]) -> None:
    fixture = Fixture(epochs=3, batches=2)
    summary = fixture.trainer.fit()
    saves = [event for event in fixture.events if event.split()[0] in ("weights", "state", "summary")]
    best, last = ["weights best", "weights last"], ["weights last"]
    assert saves == [*best, "state 1:0", *best, "state 2:0", *last, "state 3:0", "summary"]
    assert (summary["top1"], summary["epoch"], summary["last_top1"]) == (70.0, 2, 60.0)
    assert fixture.train.epochs == [(0, 0), (1, 0), (2, 0)]


def test_a_run_ends_when_its_patience_does(evaluation: list[float]) -> None:
    evaluation[:] = [50.0, 70.0, 60.0, 70.0, 90.0]
    fixture = Fixture(epochs=9, batches=2, **{"schedule.patience": 2})
    summary = fixture.trainer.fit()
    assert (summary["top1"], summary["epoch"], summary["epochs"], summary["last_top1"]) == (70.0, 2, 4, 70.0)
    assert "stopped early: 2 epochs without a better result than top-1 70.00 of epoch 2 (--patience)" in (
        fixture.report.lines
    )
    assert fixture.events[-1] == "summary" and fixture.train.epochs[-1] == (3, 0)


def test_a_run_that_was_stopped_after_its_last_epoch_only_ends() -> None:
    fixture = Fixture(epochs=9, batches=2, **{"schedule.patience": 2})
    fixture.progress.epoch, fixture.progress.best = 4, {"epoch": 2, "top1": 70.0}
    fixture.progress.last = {"epoch": 4, "top1": 60.0}
    assert fixture.trainer.fit()["epochs"] == 4 and not fixture.train.epochs
    waiting = Fixture(epochs=5, batches=2, **{"schedule.patience": 3})
    waiting.progress.epoch, waiting.progress.best = 4, {"epoch": 2, "top1": 70.0}
    assert waiting.trainer.fit()["epochs"] == 5 and waiting.train.epochs == [(4, 0)], "one epoch is left to wait"


def test_no_epochs_are_one_evaluation() -> None:
    fixture = Fixture(epochs=0)
    summary = fixture.trainer.fit()
    assert fixture.events == ["weights best", "weights last", "state 0:0", "summary"] and not fixture.train.epochs
    assert (summary["top1"], summary["epoch"], summary["epochs"]) == (50.0, 0, 0)
    assert [record["epoch"] for record in fixture.report.records] == [0]


def test_records_hold_means_over_the_steps_since_the_last_one() -> None:
    fixture = Fixture(batches=4, **{"runtime.log_every": 3})
    fixture.trainer.train_epoch()
    losses = [record["loss"] for record in fixture.report.records]
    assert losses == pytest.approx([(2 + 0 - 2) / 3, -4.0]), "the weight falls by 1 each step"
    assert [record["update"] for record in fixture.report.records] == [3, 4] and fixture.progress.images == 8


def test_a_run_goes_on_in_the_middle_of_an_epoch() -> None:
    fixture = Fixture(batches=4)
    fixture.progress.batch = 3
    fixture.trainer.train_epoch()
    assert fixture.train.epochs == [(0, 3)] and fixture.progress.update == 1


def test_a_state_is_saved_when_it_is_due_and_only_between_updates() -> None:
    fixture = Fixture(accumulate=2, batches=6)
    fixture.saver.due_at = {2}
    fixture.trainer.train_epoch()
    assert [event for event in fixture.events if event.startswith("state")] == ["state 0:4"]


def test_a_signal_stops_after_the_update_and_saves_first() -> None:
    fixture = Fixture(accumulate=2, batches=6)
    fixture.train.before[2] = lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(
        Interrupted, match=r"stopped at epoch 1, batch 4 of 6, all saved; resume with: .*--resume RUN"
    ) as stop:
        fixture.trainer.fit()
    assert stop.value.code == 128 + signal.SIGTERM
    assert fixture.events[-2:] == ["weights last", "state 0:4"] and fixture.progress.update == 2


def test_a_stop_that_cannot_save_says_what_there_is() -> None:
    fixture = Fixture()
    fixture.saver.error = OSError(28, "No space left on device")
    with pytest.raises(Interrupted, match=r"but this could not be saved \(No space left on device\): the last saved"):
        fixture.trainer.stop(signal.SIGINT)


def test_a_run_whose_end_cannot_be_saved_is_an_error() -> None:
    fixture = Fixture(batches=2)
    fixture.saver.error = OSError(28, "No space left on device")
    with pytest.raises(UserError, match=r"trained to the end, but not all is saved \(No space left on device\)"):
        fixture.trainer.fit()


def test_observers_are_open_while_it_trains_and_see_every_evaluation() -> None:
    fixture, seen = Fixture(epochs=2, batches=2), []

    class Watch:
        def __enter__(self) -> None:
            seen.append("open")

        def __exit__(self, *_: object) -> None:
            seen.append("closed")

        def epoch_ended(self, teacher: Any, student: Any, epoch: int) -> None:
            assert teacher is None and student is fixture.student
            seen.append(f"epoch {epoch}")

    fixture.trainer.observers = [Watch()]
    fixture.trainer.fit()
    assert seen == ["open", "epoch 0", "epoch 1", "epoch 2", "closed"]
