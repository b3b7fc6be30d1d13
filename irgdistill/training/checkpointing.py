"""Saves and resumes a run: its state, and the weights of the student, in a run folder."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import Field
from torch import Tensor

from irgdistill.config import TeacherConfig, dump
from irgdistill.errors import UserError, one_line, os_reason
from irgdistill.io import (
    Evaluation,
    Record,
    Report,
    RunFolder,
    own_copies,
    read_tensors,
    save_tensors,
    write_text,
)
from irgdistill.models import describe, timm_config
from irgdistill.runtime import running_statistics
from irgdistill.training.components import RunComponents
from irgdistill.training.evaluation import metric_name, score
from irgdistill.training.progress import Progress
from irgdistill.training.setup import TeacherSetup
from irgdistill.training.state import (
    ProcessState,
    SavedState,
    mean_of,
    other_state,
    position,
    random_states,
    restore_random_states,
    save_state,
)
from irgdistill.version import __version__


class Checkpointer:
    """Saves and resumes a run. The first process writes; all call every method.

    Weights are written before the state, so that a state never refers to weights that are not on disk. A save that
    fails warns once, is kept in `error`, and is tried again with the next state.
    """

    def __init__(self, components: RunComponents, progress: Progress, folder: RunFolder, report: Report) -> None:
        self.components, self.progress, self.folder, self.report = components, progress, folder, report
        self.saved = "nothing is saved"
        """The state from which the run can be resumed, in words for messages."""
        self.error: OSError | None = None
        """Why the last save failed, the same in every process; None if it succeeded."""
        self._position: str | None = None
        self._queued: dict[Path, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        self._last_save = time.monotonic()

    @property
    def resume_command(self) -> str:
        return self.folder.resume_command

    def due(self) -> bool:
        """Whether `--save-every-steps` or `--save-every-minutes` asks for a save after this update."""
        minutes = self.components.config.runtime.save_every_minutes
        late = minutes > 0 and time.monotonic() - self._last_save >= 60 * minutes
        return late or self.due_by_steps()

    def due_by_steps(self) -> bool:
        """Whether `--save-every-steps` asks for a save after this update: the same in all processes."""
        steps = self.components.config.runtime.save_every_steps
        return steps > 0 and self.progress.update % steps == 0

    # --- saving -------------------------------------------------------------------------------------------------------

    def create(self, overwrite: bool) -> None:
        """Create the run folder. Raises UserError if it holds another run, or is in use."""
        if self.components.world.main:
            self.folder.create(overwrite)

    def save_first(self) -> None:
        """Save the state of the untrained run, the teacher's record, and the descriptions. Raises OSError."""
        self.save_state()
        if self.error is not None:
            raise self.error
        self._record_teacher()
        if self.components.world.main:
            self._describe()

    def save_weights(self, which: Literal["best", "last"]) -> None:
        """Queue the evaluated weights: they are written with the next state, which must come before they change."""
        if self.components.world.main:
            weights = self.components.evaluated.model.state_dict()
            self._queued[self._path(which)] = weights, self._metadata(which)

    def save_state(self) -> None:
        """Write the queued weights and the state; `error` tells whether it failed."""
        processes = self.components.world.collect(self._process_state())
        if self.components.world.main:
            self._write(lambda: self._state(processes))
        self.error = self.components.world.broadcast(self.error)

    def save_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary of a finished run. Raises OSError, also if its state could not be saved."""
        if self.error is not None:
            raise self.error
        if self.components.world.main:
            write_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")

    def unreadable_of_all(self) -> list[str]:
        """Names of the images that no process could read, each once."""
        return _union(self.components.world.collect(self.components.unreadable.names))

    def _path(self, which: Literal["best", "last"]) -> Path:
        return self.folder.best if which == "best" else self.folder.last

    def _write(self, state: Callable[[], dict[str, Any]]) -> None:
        failed, self._last_save = self.error is not None, time.monotonic()
        try:
            self._write_weights()
            self._write_state(state())
        except OSError as error:
            self.error = error
            # Training continues and changes the weights, so the queue keeps copies.
            self._queued = {path: (own_copies(weights), about) for path, (weights, about) in self._queued.items()}
            if not failed:
                self.report.warn(f"not saved ({os_reason(error)}); {self.saved}; training continues and tries again")
        else:
            self.error = None
            if failed:
                self.report.warn(f"saved again: {self.saved}")

    def _write_weights(self) -> None:
        for path in list(self._queued):
            save_tensors(path, *self._queued[path])
            del self._queued[path]

    def _write_state(self, state: dict[str, Any]) -> None:
        here = position(state["epoch"], state["batch"])
        if here != self._position:  # otherwise nothing was trained since
            save_state(self.folder.state, state, self.folder.previous_state)
            self._mark_saved(here)

    def _mark_saved(self, where: str) -> None:
        """Remember the position of the state just written or loaded."""
        self._position = where
        self.saved = f"the last saved state is {where}"

    def _state(self, processes: list[dict[str, Any]]) -> dict[str, Any]:
        run = self.components
        return {
            "config": run.config.model_dump(mode="json"),
            "data": run.data_facts,
            "taught_by": run.setup.checksums,
            **self.progress.state_dict(),
            **run.state_dict(),
            "processes": processes,
            "bad_images": _union([process["bad_images"] for process in processes]),
            "metrics": self.report.mark(),
        }

    def _process_state(self) -> dict[str, Any]:
        """State of this process alone: random generators, sums since the last record, batch-norm statistics."""
        run = self.components
        return {
            "random": random_states(run.device),
            "bad_images": run.unreadable.names,
            "sums": {name: value.cpu() for name, value in self.progress.sums.items()},
            "statistics": [
                {name: value.cpu() for name, value in running_statistics(model).items()} for model in run.local_models
            ],
        }

    def _metadata(self, which: Literal["best", "last"]) -> dict[str, Any]:
        setup, config = self.components.setup, self.components.config
        plugins = [plugin.model_dump(mode="json") for plugin in config.plugins]
        teachers = [_teacher_record(*pair) for pair in zip(setup.teachers, config.all_teachers, strict=False)]
        return {
            **describe(setup.student, setup.classes),
            **({"plugins": plugins} if plugins else {}),
            "metrics": self.progress.best if which == "best" else self.progress.last,
            "method": config.method,
            "losses": config.losses.model_dump(mode="json"),
            "seed": config.seed,
            "teacher": teachers[0] if teachers else None,
            **({"teachers": teachers[1:]} if len(teachers) > 1 else {}),
            "matching": config.matching.model_dump(mode="json"),
            "plan": None if setup.plan is None else setup.plan.to_dict(),
            "data": config.data.model_dump(mode="json"),
            "versions": {
                "irgdistill": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
        }

    def _describe(self) -> None:
        """Write config.yaml, unless the user has one there, and timm's config.json of a network of timm."""
        if not self.folder.config.exists():
            write_text(self.folder.config, dump(self.components.config))
        setup = self.components.setup
        if setup.student.from_timm:
            write_text(self.folder.timm_config, json.dumps(timm_config(setup.student, setup.classes), indent=2) + "\n")

    def _record_teacher(self) -> None:
        if self.progress.teacher_record is not None:
            self.report.record(self.progress.teacher_record)

    # --- resuming -----------------------------------------------------------------------------------------------------

    def resume(self, state: SavedState, previous: bool = False) -> None:
        """Restore a state of the run folder, as `open_state` gives it. Raises UserError if it does not fit the run."""
        run, progress = self.components, self.progress
        self._check_same(state)
        try:
            run.load_state_dict(state)
            progress.load_state_dict(state)
            run.scheduler.step_update(progress.update)
            self._restore_process(state.processes)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            why, other = one_line(error, 200), other_state(self.folder, previous)
            raise UserError(
                f"the state in {self.folder.path} does not fit the run's networks: {why}; {other}"
            ) from None
        run.unreadable.names = state.bad_images
        self._mark_saved(state.position)
        if run.world.main:
            if previous:
                self.folder.previous_state.replace(self.folder.state)
            self.report.rewind(state.metrics)
            if (progress.epoch, progress.batch) == (0, 0):  # the first state was saved before the first record
                self._record_teacher()
            self._repair_weights()
            self._describe()
        progress.best = run.world.broadcast(progress.best)

    def _check_same(self, state: SavedState) -> None:
        """Raises UserError for other data, in which a position means nothing, and for another teacher."""
        for name, now in self.components.data_facts.items():
            if now != (then := state.data.get(name)):
                raise UserError(f"the data are not those the run was trained on: {name} {now}, were {then}")
        checksum = self.components.setup.checksums
        if checksum != state.taught_by:
            raise UserError(
                f"the teacher is not the one that the run learns from: its weights' checksum is {checksum}, "
                f"was {state.taught_by}"
            )
        epochs, batches = self.components.config.schedule.epochs, self.components.batches
        if state.epoch > epochs or state.batch > batches:
            raise UserError(f"the state is at {state.position}, and the run has {epochs} epochs of {batches} batches")

    def _restore_process(self, processes: list[ProcessState]) -> None:
        """Restore this rank's state. If the world size changed, use the mean over ranks and reseed."""
        run = self.components
        own = processes[run.world.rank % len(processes)]
        restore_random_states(own.random, run.device)
        sums, statistics = own.sums, own.statistics
        if len(processes) != run.world.size:
            sums, statistics = mean_of([[process.sums, process.statistics] for process in processes])
            torch.manual_seed(run.config.seed + self.progress.update * run.world.size + run.world.rank)
        self.progress.sums = {name: value.reshape(()).to(run.device) for name, value in sums.items()}
        for model, values in zip(run.local_models, statistics, strict=True):
            model.load_state_dict(values, strict=False)

    def _repair_weights(self) -> None:
        """Make the best and last weights on disk consistent with the restored state.

        They may be older or newer than it, or damaged.
        """
        progress = self.progress
        evaluated = progress.epoch > 0 and progress.batch == 0  # the weights of the state are those of `last`
        if not (evaluated and progress.best == progress.last):
            progress.best = best_on_disk(self.folder.best, progress.best, self.report.warn)
        if evaluated:
            progress.best = progress.best or progress.last
            if progress.best == progress.last:
                self.save_weights("best")
            self.save_weights("last")
        self._write_weights()


def _teacher_record(teacher: TeacherSetup, spec: TeacherConfig) -> dict[str, Any]:
    """A teacher in the metadata of a checkpoint, the fields of `TeacherRecord`."""
    return {
        "architecture": teacher.network.architecture,
        **spec.model_dump(mode="json", include={"checkpoint", "input_size", "pooling", "weight"}),
        "preprocessing": spec.preprocessing.given,
        "name": teacher.network.name if teacher.network.code is None else spec.name or teacher.network.name,
        "weights": teacher.checksum,
    }


class _Evaluated(Record):
    """What is read of the metadata of the best weights."""

    metrics: Evaluation = Field(default_factory=dict)


def _union(lists: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


def best_on_disk(path: Path, remembered: dict[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """Metrics of the best weights in the file at `path`; {} if it is missing or damaged.

    The file may be newer than the state, if the run was stopped between the two or resumed from the previous state: its
    weights did reach their metrics, so they count. `remembered`: the metrics in the state.
    """
    if not remembered and not path.exists():
        return {}
    try:
        found = _Evaluated.parse(read_tensors(path)[1] or {}, path, "metadata").metrics
    except UserError as error:
        if remembered:
            warn(f"{error}; {score(remembered)} of epoch {remembered['epoch']} is lost with it")
        return {}
    if remembered and found.get(metric_name(remembered), 0) < remembered[metric_name(remembered)]:
        warn(f"{path} is not the best of the run, {score(remembered)} of epoch {remembered['epoch']}")
    return found
