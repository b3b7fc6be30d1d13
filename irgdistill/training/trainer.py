"""The training loop: one step, the epochs around it, the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from irgdistill.errors import Interrupted, UserError
from irgdistill.io import Report, RunFolder, write_text
from irgdistill.losses import Batch, gradient_shares
from irgdistill.matching import Tapped
from irgdistill.runtime import Signals, Stopped, World, read_later
from irgdistill.training.checkpointing import Saved
from irgdistill.training.evaluation import Metrics, evaluate
from irgdistill.training.setup import Setup
from irgdistill.training.state import metric, reason, score


class Observer(Protocol):
    """Watches a run while it trains; `fit` enters and leaves it."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def epoch_ended(self, teacher: Tapped | None, student: Tapped, epoch: int) -> None:
        """After every evaluation, and once with `epoch` 0 before training."""


class Trainer(Saved):
    """One run: `Trainer(prepare(config), RunFolder(path), Report(…)).fit()`, in each process of `world`."""

    def __init__(self, setup: Setup, folder: RunFolder, report: Report, world: World | None = None) -> None:
        super().__init__(setup, folder, report, world or World())
        self.signals = Signals(patient=True)
        self.observers: Sequence[Observer] = ()

    # --- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, images: Tensor, labels: Tensor, cached: Tensor | None = None) -> dict[str, Tensor]:
        """Raw images (B, 3, H, W), labels (B,) -> total and raw terms. One backward; an update at a boundary.

        `cached`: answers (B, n) of the teacher cache, where there is one.
        """
        if self.config.runtime.compile:
            torch.compiler.cudagraph_mark_step_begin()  # what recorded graphs gave may be overwritten from here on
        images, targets = self._mixed(images, labels)
        boundary = (self.batch + 1) % self.accumulate == 0
        with self.world.gradients(self.student, exchanged=boundary), self.autocast:
            with torch.no_grad():
                teacher = None if self.teacher is None else self.teacher(images)
            if self.cache is not None and cached is not None:
                teacher = self.cache.output(cached)
            student = self.student(images)
        total, raw, weights = self.loss.losses(Batch(student, targets, teacher), self.update / self.updates)
        broken = read_later(self.world.maximum((~total.detach().isfinite()).int()))
        self._sample_shares(raw, weights, broken)
        self.scaler.scale(total / self.accumulate).backward()
        self._refuse_non_finite(raw, broken)
        self.batch += 1
        if boundary:
            self._update_weights()
        return {"loss": total.detach(), **{name: value.detach() for name, value in raw.items()}}

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images and their targets, mixed where that is on; None where the labels are not to be used."""
        known = self.config.data.labels
        if self.mix is not None:
            images, labels = self.mix(images.float(), labels if known else torch.zeros_like(labels))
        return images, labels if known else None

    def _update_weights(self) -> None:
        if self.config.optim.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.tapped.parameters(), self.config.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.update += 1
        self.scheduler.step_update(self.update)
        if self.ema is not None:
            self.ema.update(self.tapped.model, step=self.update)

    def _refuse_non_finite(self, raw: dict[str, Tensor], broken: Callable[[], bool]) -> None:
        """Raises UserError where the total was `broken`, not finite, in any process."""
        if broken():
            values = self.world.sum(torch.stack([value.detach().float() for value in raw.values()])).tolist()
            found = zip(raw, values, strict=True)
            guilty = ", ".join(f"{name} = {value}" for name, value in found if not math.isfinite(value))
            raise UserError(
                f"the loss is not finite at update {self.update + 1}, epoch {self.epoch + 1} ({guilty or 'total'}); "
                "the weights were not changed; a lower --lr, --clip-grad 1 or --amp none may help"
            )

    def _sample_shares(self, raw: dict[str, Tensor], weights: dict[str, float], broken: Callable[[], bool]) -> None:
        every = self.config.runtime.gradient_shares_every
        if every and len(raw) > 1 and self.update % every == 0 and self.batch % self.accumulate == 0:
            self._refuse_non_finite(raw, broken)
            shares = gradient_shares(raw, weights, list(self.tapped.parameters()), self.world)
            self.report.record({"kind": "gradient", "epoch": self.epoch + 1, "update": self.update, "share": shares})

    # --- the run ------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch -> the run's summary. Raises UserError, or Interrupted once everything is saved.

        A first SIGINT or SIGTERM stops it after the update under way, a second one at once, with `Stopped`.
        """
        epochs = self.config.schedule.epochs
        with (
            self.signals,
            self.report.progress(epochs * self.batches, self._done()),
            ExitStack() as stack,
        ):
            for observer in self.observers:
                stack.enter_context(observer)
            if self.batch == 0:
                self._notify()
            while self.epoch < epochs:
                if self.batch < self.batches:
                    self._train_epoch()
                self._end_epoch(self._evaluate())
                if self.epoch < epochs:
                    self._pause()
        return self._finish()

    def start(self, overwrite: bool = False) -> None:
        """Try the teacher, make the run folder, save the first state: with it, the run has begun.

        Raises UserError where the folder is taken, OSError when it cannot be written.
        """
        self.tried = self._check_teacher() if self.teacher is not None and self.config.teacher.check else None
        if self.world.main:
            self.folder.create(overwrite)
        self._seed()
        self._save()
        if self.saver.error is not None:
            raise self.saver.error
        self._record_teacher()
        if self.world.main:
            self._describe()

    def _train_epoch(self) -> None:
        self.student.train()
        log_every = self.config.runtime.log_every * self.accumulate
        since, images_since = time.perf_counter(), 0
        for images, labels, *cached in self.train.epoch(self.epoch, start=self.batch):
            values = {"count": torch.ones((), device=self.device), **self.train_step(images, labels, *cached)}
            self.sums = {name: self.sums[name] + value for name, value in values.items()} if self.sums else values
            images_since += len(labels) * self.world.size
            if self.batch % log_every == 0 or self.batch == self.batches:
                self._log(images_since, time.perf_counter() - since)
                since, images_since = time.perf_counter(), 0
            if self.batch % self.accumulate == 0:
                self._pause()
            if self.batch == self.batches:
                return

    def _evaluate(self) -> Metrics:
        """Of the student as it is saved. A signal leaves it at once: the state before it is as good.

        Many processes wait for one another, so they finish it.
        """
        for model in self._unshared():
            self.world.average_statistics(model)
        try:
            with self.signals.impatient() if self.world.size == 1 else nullcontext():
                labelled = self.setup.splits.labelled
                teacher = None if labelled else self.teacher
                return evaluate(self.deployed, self.val, self.autocast, teacher, self.world, labelled)
        except Stopped:
            self._pause()
            raise

    def _log(self, images: int, seconds: float) -> None:
        self.seconds, self.images_seen = self.seconds + seconds, self.images_seen + images
        asked = time.perf_counter()
        count, *sums = self.world.mean(torch.stack([value.float() for value in self.sums.values()])).tolist()
        means = dict(zip(list(self.sums)[1:], (value / count for value in sums), strict=True))
        self.sums = {}
        terms = {name: value for name, value in means.items() if name != "loss"}
        self.report.record(
            {
                "kind": "train",
                "epoch": self.epoch + 1,
                "update": self.update,
                "lr": self.optimizer.param_groups[0]["lr"],
                "loss": means["loss"],
                "terms": terms,
                "images_per_second": images / seconds,
            }
        )
        slow = self.train.bottleneck(seconds, time.perf_counter() - asked)
        if slow:
            self.report.warn(slow)
        title = f"epoch {self.epoch + 1}/{self.config.schedule.epochs}"
        if self.best and self.last:
            title += f"  {score(self.last)} (best {self.best[metric(self.best)]:.2f})"
        self.report.advance(self._done(), title, means, images / seconds)

    def _end_epoch(self, metrics: Metrics) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self.last = {"epoch": self.epoch, **{k: v for k, v in asdict(metrics).items() if v is not None}}
        self.report.record({"kind": "eval", **self.last})
        self._notify()
        better = not self.best or self.last[metric(self.last)] > self.best[metric(self.last)]
        if better:
            self.best = self.last
            self._save_weights("best")
        self._save_weights("last")
        self._save()
        more = (
            f"KL {metrics.kl:.3f}" if metrics.top1 is None else f"top-5 {metrics.top5:.2f}  val loss {metrics.loss:.3f}"
        )
        epochs, best = self.config.schedule.epochs, "  (best)" if better else ""
        self.report.line(f"epoch {self.epoch}/{epochs}  {score(self.last)}  {more}{best}")

    def _finish(self) -> dict[str, Any]:
        teacher = self.setup.teacher
        if self.saver.error is not None:
            self._save()
        summary: dict[str, Any] = {
            "method": self.config.method,
            "student": self.setup.student.name,
            "teacher": None if teacher is None else teacher.name,
            **{key: self.best[key] for key in ("top1", "top5", "agreement", "epoch") if key in self.best},
            f"last_{metric(self.last)}": self.last[metric(self.last)],
            "epochs": self.config.schedule.epochs,
            "seconds": self.seconds,
            "images_per_second": self.images_seen / max(self.seconds, 1e-9),
            "seed": self.config.seed,
            "bad_images": self._bad_images(self.world.collect(self.bad.names)),
        }
        try:
            if self.saver.error is not None:
                raise self.saver.error
            if self.world.main:
                write_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"trained to the end, but not all is saved ({reason(error)}): {self.saver.saved}; "
                f"make room, then: {self.folder.resume_command}"
            ) from None
        return summary

    def _notify(self) -> None:
        for observer in self.observers:
            observer.epoch_ended(self.teacher, self.deployed, self.epoch)

    # --- stopping -----------------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        """Between two updates: stop if a signal asked any process for it, save if it is time."""
        here = [self.signals.received or 0, int(self.saver.due(self.update))]
        asked, due = self.world.maximum(torch.tensor(here)).tolist()
        if asked:
            self._stop(asked)
        if due:
            self._save()

    def _stop(self, number: int) -> None:
        self._save_weights("last")
        self._save()
        where = f"epoch {self.epoch + 1}, batch {self.batch} of {self.batches}"
        saved = "all saved"
        if self.saver.error is not None:
            saved = f"but this could not be saved ({reason(self.saver.error)}): {self.saver.saved}"
        raise Interrupted(
            128 + number,
            f"stopped at {where}, {saved}; go on with: {self.folder.resume_command}",
        )

    def _done(self) -> int:
        return self.epoch * self.batches + self.batch
