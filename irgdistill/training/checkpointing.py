"""What a run keeps and goes on from: its position, its state and weights on disk, what each process has of its own."""

from __future__ import annotations

import json
import platform
import textwrap
from typing import Any

import timm
import torch
from timm.utils import random_seed
from torch import Tensor, nn

from irgdistill.config import dump
from irgdistill.errors import UserError
from irgdistill.io import Report, RunFolder, write_text
from irgdistill.models import describe, timm_config
from irgdistill.runtime import World, running_statistics
from irgdistill.training.components import Parts
from irgdistill.training.setup import Setup
from irgdistill.training.state import Saver, best_on_disk, mean_of, other_state, random_states, restore_random_states
from irgdistill.version import __version__


class Saved(Parts):
    """The parts of a run with its position in a run folder; see `Trainer`, which moves it."""

    def __init__(self, setup: Setup, folder: RunFolder, report: Report, world: World) -> None:
        super().__init__(setup, report, world)
        self.folder = folder
        self.epoch = self.batch = self.update = 0
        """Epochs done, batches of the next one done, updates done."""
        self.sums: dict[str, Tensor] = {}
        self.best: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.seconds, self.images_seen = 0.0, 0
        self.tried: dict[str, Any] | None = None
        """Record of the teacher's accuracy."""
        self.saver = Saver(folder, self.config.runtime, report.warn)

    def resume(self, state: dict[str, Any], previous: bool = False) -> None:
        """Go on from a state of the run folder (`open_state`). Raises UserError when it does not fit."""
        self._check_same(state)
        try:
            self.tapped.model.load_state_dict(state["student"])
            self.adapters.load_state_dict(state.get("adapters", {}))
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            why, other = textwrap.shorten(str(error), 200, placeholder=" …"), other_state(self.folder, previous)
            raise UserError(
                f"the state in {self.folder.path} does not fit the run's networks: {why}; {other}"
            ) from None
        self.epoch, self.batch, self.update = state["epoch"], state["batch"], state["update"]
        self.scheduler.step_update(self.update)
        self.best, self.last = state["best"], state["last"]
        self.seconds, self.images_seen = state["seconds"], state["images_seen"]
        self.bad.names = state["bad_images"]
        self._restore_own(state["processes"])
        self.saver.has(state)
        if self.world.main:
            if previous:
                self.folder.previous_state.replace(self.folder.state)
            self.report.rewind(state["metrics"])
            self.tried = state.get("tried")
            if (self.epoch, self.batch) == (0, 0):  # the first state was saved before the first record
                self._record_teacher()
            self._repair()
        self.best = self.world.broadcast(self.best)

    def _record_teacher(self) -> None:
        if self.tried is not None:
            self.report.record(self.tried)

    def _check_same(self, state: dict[str, Any]) -> None:
        """The data, in which a position means nothing elsewhere, and the teacher. Raises UserError."""
        for name, now in self.data.items():
            if now != (then := state["data"][name]):
                raise UserError(f"the data are not those the run was trained on: {name} {now}, were {then}")
        if self.setup.taught_by != state["taught_by"]:
            raise UserError(
                f"the teacher is not the one that the run learns from: its weights' checksum is "
                f"{self.setup.taught_by}, was {state['taught_by']}"
            )

    def _repair(self) -> None:
        """Weights on disk may be older or newer than the state, or damaged: in the end they and the record agree."""
        evaluated = self.epoch > 0 and self.batch == 0  # the weights of the state are those that `last` is about
        if not (evaluated and self.best == self.last):
            self.best = best_on_disk(self.folder.best, self.best, self.report.warn)
        if evaluated:
            self.best = self.best or self.last
            if self.best == self.last:
                self._save_weights("best")
            self._save_weights("last")
        self.saver.write_weights()
        self._describe()

    def _describe(self) -> None:
        if not self.folder.config.exists():
            write_text(self.folder.config, dump(self.config))
        config = timm_config(self.setup.student, self.setup.classes)
        write_text(self.folder.timm_config, json.dumps(config, indent=2) + "\n")

    # --- saving -------------------------------------------------------------------------------------------------------

    def _save_weights(self, which: str) -> None:
        if not self.world.main:
            return
        setup, teacher = self.setup, self.setup.teacher
        metadata = {
            **describe(setup.student, setup.classes),
            "metrics": self.best if which == "best" else self.last,
            "method": self.config.method,
            "losses": self.config.losses.model_dump(mode="json"),
            "seed": self.config.seed,
            "teacher": None
            if teacher is None
            else {
                "architecture": teacher.architecture,
                **self.config.teacher.model_dump(mode="json", include={"checkpoint", "input_size"}),
                "name": teacher.name,
                "weights": setup.taught_by,
            },
            "matching": self.config.matching.model_dump(mode="json"),
            "plan": None if setup.plan is None else setup.plan.to_dict(),
            "data": self.config.data.model_dump(mode="json"),
            "versions": {
                "irgdistill": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
        }
        self.saver.add(getattr(self.folder, which), self.deployed.model.state_dict(), metadata)

    def _save(self) -> None:
        """The first process writes; all know whether it could."""
        processes = self.world.collect(self._own())
        if self.world.main:
            self.saver.save(lambda: self._state(processes))
        self.saver.error = self.world.broadcast(self.saver.error)

    def _state(self, processes: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "data": self.data,
            "taught_by": self.setup.taught_by,
            "epoch": self.epoch,
            "batch": self.batch,
            "update": self.update,
            "student": self.tapped.model.state_dict(),
            "adapters": self.adapters.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "processes": processes,
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
            "images_seen": self.images_seen,
            "bad_images": self._bad_images([own["bad_images"] for own in processes]),
            "metrics": self.report.mark(),
            "tried": self.tried,
        }

    @staticmethod
    def _bad_images(names: list[list[str]]) -> list[str]:
        return list(dict.fromkeys(name for found in names for name in found))

    # --- what each process has of its own -----------------------------------------------------------------------------

    def _own(self) -> dict[str, Any]:
        """What this process has of its own: generators, sums since the last record, batch-norm statistics."""
        return {
            "random": random_states(),
            "bad_images": self.bad.names,
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "statistics": [{k: v.cpu() for k, v in running_statistics(model).items()} for model in self._unshared()],
        }

    def _restore_own(self, processes: list[dict[str, Any]]) -> None:
        """Each process takes its own entry; another number of them takes the means and starts new generators."""
        own = processes[self.world.rank % len(processes)]
        restore_random_states(own["random"])
        if len(processes) != self.world.size:
            own = mean_of([{name: entry[name] for name in ("sums", "statistics")} for entry in processes])
            torch.manual_seed(self.config.seed + self.update * self.world.size + self.world.rank)
        self.sums = {name: value.to(self.device) for name, value in own["sums"].items()}
        for model, statistics in zip(self._unshared(), own["statistics"], strict=True):
            model.load_state_dict(statistics, strict=False)

    def _unshared(self) -> list[nn.Module]:
        """Networks whose batch-norm statistics each process gathers for itself."""
        if self.config.runtime.sync_bn:
            return []
        return [self.tapped.model, *([] if self.ema is None else [self.ema.module])]

    def _seed(self) -> None:
        """Python's and numpy's generators, which mix images, are alike everywhere; torch's, for dropout, are not."""
        random_seed(self.config.seed)
        if not self.world.main:
            torch.manual_seed(self.config.seed + self.world.rank)
