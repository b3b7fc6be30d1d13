"""Trains several runs in turns, batch by batch: what they share is then loaded and computed once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from irgdistill.errors import Interrupted
from irgdistill.runtime import Signals, compiler_settings, gpu_settings
from irgdistill.training.shared import SharedParts
from irgdistill.training.state import RandomStates, random_states, restore_random_states
from irgdistill.training.trainer import Trainer


class Turns:
    """The steps of a run between those of others, with random states of its own.

    Made right after the run was started or resumed, before another one draws random numbers.
    """

    def __init__(self, trainer: Trainer, shared: SharedParts) -> None:
        self.trainer, self.shared = trainer, shared
        self._steps = trainer.steps()
        self._random = random_states(trainer.components.device)
        self._rested: tuple[float, float] | None = None

    def take(self) -> bool:
        """Train on a batch, or evaluate -> whether there is more to do. Raises what `Trainer.fit` raises."""
        device = self.trainer.components.device
        if self._rested is not None:  # loading, which one run does for all, counts for each as if it were alone
            since, loaded = self._rested
            self.trainer.away += time.perf_counter() - since - (self._loading() - loaded)
        restore_random_states(RandomStates.model_validate(self._random), device)
        try:
            return next(self._steps, self) is None
        finally:
            self._random = random_states(device)
            self._rested = time.perf_counter(), self._loading()

    def _loading(self) -> float:
        return 0.0 if self.shared.train is None else self.shared.train.seconds


def fit_together(runs: Sequence[Turns]) -> list[dict[str, Any]]:
    """Train runs that share their parts, each at the same update, to the end -> their summaries.

    Each is trained as `Trainer.fit` would, bit for bit on a CPU. A signal stops all after the same batch. Raises what
    `Trainer.fit` raises; the other runs then keep their last saved states.
    """
    first, signals = runs[0].trainer, Signals(patient=True)
    for run in runs:
        run.trainer.signals = signals
    epochs, batches = first.config.schedule.epochs, first.components.batches
    with (
        signals,
        compiler_settings(first.config.runtime.compile),
        gpu_settings(first.components.device, first.config.runtime.deterministic),
        first.report.progress(epochs * batches, first.progress.epoch * batches + first.progress.batch),
    ):
        left = list(runs)
        while left:
            left = _round(left)
    return [run.trainer.finish() for run in runs]


def _round(runs: Sequence[Turns]) -> list[Turns]:
    """A turn of each run -> those with more to do. Raises Interrupted when all have stopped at this place."""
    left, stop = list[Turns](), None
    for run in runs:
        try:
            if run.take():
                left.append(run)
        except Interrupted as stopped:
            stop = stopped
    if stop is None:
        return left
    for run in left:  # they had their turn before the signal came
        with suppress(Interrupted):
            run.trainer.stop(stop.code - 128)
    raise stop
