"""The training loop: one step, the epochs around it, the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from irgdistill.errors import Interrupted, TrainingError, os_reason
from irgdistill.io import SELECTING, Report, RunFolder
from irgdistill.losses import Batch, gradient_shares
from irgdistill.runtime import Signals, Stopped, World, compiler_settings, gpu_settings, read_later
from irgdistill.training.checkpointing import Checkpointer
from irgdistill.training.components import RunComponents, build_components
from irgdistill.training.evaluation import Metrics, details, evaluate, metric_name, score
from irgdistill.training.observer import Observer
from irgdistill.training.optimization import WatchedOptimizer, refuse_skipped, scaled_step
from irgdistill.training.progress import Progress
from irgdistill.training.setup import Setup
from irgdistill.training.shared import SharedParts
from irgdistill.training.state import seed_process
from irgdistill.training.teacher_check import check_teachers

MEET = 0.5
"""Seconds after which several processes share whether one was told to stop or has to save."""


class Trainer:
    """Trains a run made by `build_trainer`, in each process of `components.world`."""

    def __init__(
        self,
        components: RunComponents,
        progress: Progress,
        checkpointer: Checkpointer,
        report: Report,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.components, self.progress, self.checkpointer = components, progress, checkpointer
        self.report, self.observers = report, observers
        self.config, self.world = components.config, components.world
        self.signals = Signals(patient=True)
        self.away = 0.0
        """Seconds in which other runs had their turn, which are no training time of this one."""
        self._met, self._updates, self._every = time.monotonic(), 0, 1
        self._skipped = 0

    def train_step(self, images: Tensor, labels: Tensor, cached: Tensor | None = None) -> dict[str, Tensor]:
        """Raw images (B, 3, H, W) and labels (B,) -> total loss and raw terms, scalars without gradient.

        Runs backward once, and updates the weights when `accumulate` batches have gone by. `cached` (B, n): the rows of
        the teacher cache for these images. Raises TrainingError before the weights change if the loss is not finite.
        """
        run, progress = self.components, self.progress
        update_due = (progress.batch + 1) % run.accumulate == 0
        if self.config.runtime.compile:
            torch.compiler.cudagraph_mark_step_begin()  # the outputs of the previous step may be overwritten from here
        images, targets = self._mixed(images, labels)
        with self.world.gradients(run.trained, exchanged=update_due), run.autocast:
            teachers = [] if run.teacher is None else run.teacher(images, cached)
            student = run.trained(images)
        batch = Batch(student, targets, teachers[0] if teachers else None, teachers[1:])
        total, raw, weights = run.loss.losses(batch, progress.update / run.updates)
        non_finite = read_later(self.world.maximum((~total.detach().isfinite()).int()))
        self._record_gradient_shares(raw, weights, non_finite)
        run.scaler.scale(total / run.accumulate).backward()
        self._refuse_non_finite(raw, non_finite)
        progress.batch += 1
        if update_due:
            self.update_weights()
        return {"loss": total.detach(), **{name: value.detach() for name, value in raw.items()}}

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images and targets after mixup; no targets if the labels are not to be used."""
        labelled = self.config.data.labels
        if self.components.mixup is not None:
            images, labels = self.components.mixup(images.float(), labels if labelled else torch.zeros_like(labels))
        return images, labels if labelled else None

    def update_weights(self) -> None:
        """Clip the gradients, step optimizer and schedule, and average the weights.

        With fp16 the scaler skips an update whose gradients are not finite, and lowers its scale; that is none then.
        Raises TrainingError after many in a row, and if the optimizer fails, as with a state that does not fit.
        """
        run, progress, optimizer = self.components, self.progress, WatchedOptimizer(self.components.optimizer)
        if self.config.optim.clip_grad is not None:
            run.scaler.unscale_(optimizer)  # type: ignore[arg-type]
            torch.nn.utils.clip_grad_norm_(run.student.parameters(), self.config.optim.clip_grad)
        scaled_step(run.scaler, optimizer, self.config.optim.name, progress.update + 1)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        if not optimizer.stepped:
            self._skipped += 1
            refuse_skipped(self._skipped, progress.update + 1)
            return
        self._skipped = 0
        progress.update += 1
        run.scheduler.step_update(progress.update)
        if run.ema is not None:
            run.ema.update(run.student.model, step=progress.update)

    def _refuse_non_finite(self, raw: dict[str, Tensor], non_finite: Callable[[], bool]) -> None:
        """Raises TrainingError if the total is not finite in any process."""
        if non_finite():
            values = self.world.sum(torch.stack([value.detach().float() for value in raw.values()])).tolist()
            found = zip(raw, values, strict=True)
            guilty = ", ".join(f"{name} = {value}" for name, value in found if not math.isfinite(value))
            raise TrainingError(
                f"the loss is not finite at update {self.progress.update + 1}, epoch {self.progress.epoch + 1} "
                f"({guilty or 'total'}); the weights were not changed; a lower --lr, --clip-grad 1 or --amp none may "
                "help"
            )

    def _record_gradient_shares(
        self, raw: dict[str, Tensor], weights: dict[str, float], non_finite: Callable[[], bool]
    ) -> None:
        every, progress = self.config.runtime.gradient_shares_every, self.progress
        if every and len(raw) > 1 and progress.update % every == 0 and progress.batch % self.components.accumulate == 0:
            self._refuse_non_finite(raw, non_finite)
            shares = gradient_shares(raw, weights, list(self.components.student.parameters()), self.world)
            values = {"epoch": progress.epoch + 1, "update": progress.update, "share": shares}
            self.report.record({"kind": "gradient", **values})

    # --- the run ------------------------------------------------------------------------------------------------------

    def start(self, overwrite: bool = False) -> None:
        """Check the teacher, create the run folder, save the first state: from here on the run can be resumed.

        Raises UserError if the folder is in use, OSError if it cannot be written.
        """
        runtime = self.config.runtime
        with compiler_settings(runtime.compile), gpu_settings(self.components.device, runtime.deterministic):
            self.progress.teacher_record = check_teachers(self.components, self.report)
        self.checkpointer.create(overwrite)
        seed_process(self.config.seed, self.world)
        self.checkpointer.save_first()

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch -> the run's summary. Raises TrainingError, or Interrupted once everything is saved.

        With `--patience` it ends sooner where that many epochs bring no better result; with 0 epochs it only evaluates.
        The first SIGINT or SIGTERM stops it after the current update, a second one at once, by `Stopped`.
        """
        run, epochs = self.components, self.config.schedule.epochs
        with (
            self.signals,
            compiler_settings(self.config.runtime.compile),
            gpu_settings(run.device, self.config.runtime.deterministic),
            self.report.progress(epochs * run.batches, self._batches_done()),
            ExitStack() as stack,
        ):
            for observer in self.observers:
                stack.enter_context(observer)
            for _ in self.steps():
                pass
        return self.finish()

    def steps(self) -> Iterator[None]:
        """Train to the last epoch, and rest after every batch and evaluation: there another run can have its turn.

        `fit` takes these steps within the contexts that a run needs.
        """
        run, progress, epochs = self.components, self.progress, self.config.schedule.epochs
        if progress.batch == 0 and epochs > 0:
            self._notify()
        self.world.wait()  # loggers and observers of the first process may have taken long
        if epochs == 0:
            self.end_epoch(self.evaluate())
        while not self._done():
            if progress.batch < run.batches:
                yield from self.epoch_steps()
            self.end_epoch(self.evaluate())
            if not self._done():
                self._pause()
                yield
        if progress.epoch < epochs:
            self.report.line(
                f"stopped early: {self.config.schedule.patience} epochs without a better result than "
                f"{score(progress.best)} of epoch {progress.best['epoch']} (--patience)"
            )

    def _done(self) -> bool:
        """Whether the training is over: after the last epoch, or early."""
        schedule = self.config.schedule
        return self.progress.epoch >= schedule.epochs or self.progress.stalled(schedule.patience)

    def train_epoch(self) -> None:
        """Train on the batches that are left of the epoch."""
        for _ in self.epoch_steps():
            pass

    def epoch_steps(self) -> Iterator[None]:
        """The same, with a rest after every batch."""
        run, progress = self.components, self.progress
        run.trained.train()
        log_every = self.config.runtime.log_every * run.accumulate
        since, images_since = self._clock(), 0
        for images, labels, *cached in run.train.epoch(progress.epoch, start=progress.batch):
            progress.add(self.train_step(images, labels, *cached))
            images_since += len(labels) * self.world.size
            if progress.batch % log_every == 0 or progress.batch == run.batches:
                self._log(images_since, self._clock() - since)
                since, images_since = self._clock(), 0
            if progress.batch % run.accumulate == 0 and self._meets():
                self._pause()
            yield
            if progress.batch == run.batches:
                return

    def _clock(self) -> float:
        """Seconds in which this run had its turn."""
        return time.perf_counter() - self.away

    def evaluate(self) -> Metrics:
        """Evaluate the weights that would be saved.

        A signal aborts it: the last saved state loses nothing. Several processes wait for one another, so they finish.
        """
        run = self.components
        for model in run.local_models:
            self.world.average_statistics(model)
        try:
            with self.signals.impatient() if self.world.size == 1 else nullcontext():
                if run.held_out is not None:
                    return run.held_out.measure(run.evaluated, run.projector)
                labelled = run.setup.splits.labelled
                teacher = None if labelled or run.teacher is None else run.teacher.network
                return evaluate(run.evaluated, run.validation, run.autocast, teacher, self.world, labelled)
        except Stopped:
            self._pause()
            raise

    def end_epoch(self, metrics: Metrics) -> None:
        """Record the metrics of an epoch and save."""
        progress, epochs = self.progress, self.config.schedule.epochs
        found = {key: value for key, value in asdict(metrics).items() if value is not None}
        better = progress.end_epoch(found, trained=epochs > 0)
        self.report.record({"kind": "eval", **progress.last})
        self._notify()
        if better:
            self.checkpointer.save_weights("best")
        self.checkpointer.save_weights("last")
        self.checkpointer.save_state()
        best = "  (best)" if better else ""
        title = f"epoch {progress.epoch}/{epochs}" if epochs else "initial weights"
        self.report.line(f"{title}  {score(progress.last)}  {details(metrics)}{best}")

    def _log(self, images: int, seconds: float) -> None:
        run, progress = self.components, self.progress
        progress.seconds, progress.images = progress.seconds + seconds, progress.images + images
        read = time.perf_counter()
        means = progress.take_means(self.world)
        record = {
            **{"kind": "train", "epoch": progress.epoch + 1, "update": progress.update},
            "lr": max(group["lr"] for group in run.optimizer.param_groups),
            "loss": means["loss"],
            "terms": {name: value for name, value in means.items() if name != "loss"},
            "images_per_second": images / seconds,
        }
        self.report.record(record)
        slow = run.train.bottleneck(seconds, time.perf_counter() - read)
        if slow:
            self.report.warn(slow)
        title = f"epoch {progress.epoch + 1}/{self.config.schedule.epochs}"
        if progress.best and progress.last:
            title += f"  {score(progress.last)} (best {progress.best[metric_name(progress.best)]:.2f})"
        self.report.advance(self._batches_done(), title, means, images / seconds)

    def finish(self) -> dict[str, Any]:
        """Save the summary of the trained run and return it. Raises TrainingError if not all can be saved."""
        progress, setup, saver = self.progress, self.components.setup, self.checkpointer
        best, last = progress.best, progress.last
        if saver.error is not None:
            saver.save_state()
        summary: dict[str, Any] = {
            "method": self.config.method,
            "student": setup.student.name,
            "teacher": None if setup.teacher is None else setup.teacher.name,
            **{key: best[key] for key in (*SELECTING, "top5", "epoch") if key in best},
            f"last_{metric_name(last)}": last[metric_name(last)],
            **({"teacher_top1": progress.teacher_record["top1"]} if progress.teacher_record else {}),
            "epochs": progress.epoch,
            "seconds": progress.seconds,
            "images_per_second": progress.images / max(progress.seconds, 1e-9),
            "seed": self.config.seed,
            "bad_images": saver.unreadable_of_all(),
        }
        try:
            saver.save_summary(summary)
        except OSError as error:
            raise TrainingError(
                f"trained to the end, but not all is saved ({os_reason(error)}): {saver.saved}; "
                f"free some space, then: {saver.resume_command}"
            ) from None
        return summary

    # --- observers and signals ----------------------------------------------------------------------------------------

    def _notify(self) -> None:
        run = self.components
        teacher = None if run.teacher is None else run.teacher.network
        for observer in self.observers:
            observer.epoch_ended(teacher, run.evaluated, self.progress.epoch)

    def _meets(self) -> bool:
        """Whether the processes share news after this update: at each that `--save-every-steps` names, else as often
        as in MEET seconds, so that none waits for the others between two updates."""
        self._updates += 1
        return self.world.size == 1 or self._updates >= self._every or self.checkpointer.due_by_steps()

    def _pause(self) -> None:
        """Between two updates: stop if any process received a signal, save if it is time."""
        since, self._met = self._met, time.monotonic()
        here = [self.signals.received or 0, int(self.checkpointer.due()), math.ceil(1000 * (self._met - since))]
        received, due, milliseconds = self.world.maximum(torch.tensor(here)).tolist()
        self._every = min(max(int(self._updates * 1000 * MEET / max(milliseconds, 1)), 1), 2 * self._every)
        self._updates = 0
        if received:
            self.stop(received)
        if due:
            self.checkpointer.save_state()

    def stop(self, number: int) -> None:
        """Save, and raise Interrupted with the exit code of a signal."""
        progress, saver = self.progress, self.checkpointer
        saver.save_weights("last")
        saver.save_state()
        where = f"epoch {progress.epoch + 1}, batch {progress.batch} of {self.components.batches}"
        saved = "all saved"
        if saver.error is not None:
            saved = f"but this could not be saved ({os_reason(saver.error)}): {saver.saved}"
        raise Interrupted(128 + number, f"stopped at {where}, {saved}; resume with: {saver.resume_command}")

    def _batches_done(self) -> int:
        return self.progress.epoch * self.components.batches + self.progress.batch


def build_trainer(
    setup: Setup, folder: RunFolder, report: Report, world: World | None = None, shared: SharedParts | None = None
) -> Trainer:
    """A trainer of `setup` that saves to `folder`: call `start()` or `checkpointer.resume(state)`, then `fit()`."""
    components, progress = build_components(setup, world or World(), report, shared), Progress()
    return Trainer(components, progress, Checkpointer(components, progress, folder, report), report)
