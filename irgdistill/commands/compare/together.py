"""Trains the runs of one seed in one process, in turns on the same batches (`--together`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from irgdistill.commands.compare.table import Run
from irgdistill.commands.distill import begin, reopen, with_changes
from irgdistill.errors import UserError
from irgdistill.io import Report
from irgdistill.runtime import keep_memory
from irgdistill.training import (
    SavedState,
    Setup,
    SharedInputs,
    SharedParts,
    Turns,
    fit_together,
    open_state,
    prepare,
    score,
)


@dataclass(frozen=True)
class Ready:
    """A run that can start, or go on from its state."""

    run: Run
    setup: Setup
    state: SavedState | None

    @property
    def place(self) -> tuple[Any, ...]:
        """Runs of the same place see the same batches from here on."""
        config, update = self.setup.config, 0 if self.state is None else self.state.update
        return update, self.setup.crop, config.data.model_dump_json(), config.augment.model_dump_json()


def train_together(left: Sequence[Run], changed: dict[str, Any], inputs: SharedInputs) -> None:
    """Train the runs, those of a seed together. `changed`: what resumed runs change of their settings.

    Raises UserError, before the first batch of a seed if the error can be found by then, and what training raises.
    """
    done = 0
    for _, runs in groupby(left, key=lambda run: run.config.seed):
        for group in _groups([_prepared(run, changed, inputs) for run in runs]):
            last = done + len(group)
            numbers = f"{last}" if len(group) == 1 else f"{done + 1} to {last}"
            Report().line(f"[{numbers} of {len(left)}] {'; '.join(ready.run.name for ready in group)}")
            _train(group)
            done = last


def _prepared(run: Run, changed: dict[str, Any], inputs: SharedInputs) -> Ready:
    try:
        if not run.folder.state.exists():
            return Ready(run, prepare(run.config, inputs=inputs), None)
        state, config = open_state(run.folder)
        return Ready(run, prepare(with_changes(config, changed), resuming=True, inputs=inputs), state)
    except UserError as error:
        raise UserError(f"{run.name}: {error}") from None


def _groups(runs: Sequence[Ready]) -> Iterator[list[Ready]]:
    """The runs by place; those with a teacher first, which the others' loader must serve."""
    places = list(dict.fromkeys(ready.place for ready in runs))
    for place in places:
        yield sorted((ready for ready in runs if ready.place == place), key=lambda ready: not ready.setup.teachers)


def _train(group: Sequence[Ready]) -> None:
    shared, turns = SharedParts(), list[Turns]()
    for ready in group:
        folder = ready.run.folder
        report = Report(folder.metrics, name=ready.run.config.method)
        try:
            if ready.state is None:
                trainer = begin(ready.setup, folder, report, overwrite=True, shared=shared)
            else:
                trainer = reopen(ready.setup, folder, report, ready.state, shared=shared)
        except UserError as error:
            raise UserError(f"{ready.run.name}: {error}") from None
        turns.append(Turns(trainer, shared))
    keep_memory(turns[0].trainer.components.device)
    shared.open()
    for ready, summary in zip(group, fit_together(turns), strict=True):
        Report().line(f"{ready.run.name}: best {score(summary)} at epoch {summary['epoch']} of {summary['epochs']}")
