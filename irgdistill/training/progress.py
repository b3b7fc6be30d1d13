"""The position of a run, its results so far, and the sums behind its next record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from irgdistill.runtime import World
from irgdistill.training.evaluation import metric_name

if TYPE_CHECKING:
    from irgdistill.training.state import SavedState


@dataclass
class Progress:
    """All that changes while a run trains, beside weights and optimizer."""

    epoch: int = 0
    """Epochs done."""
    batch: int = 0
    """Batches of the next epoch done."""
    update: int = 0
    """Updates of the weights done."""
    best: dict[str, Any] = field(default_factory=dict)
    """Metrics of the best evaluation, with its `epoch`; empty before the first one."""
    last: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last evaluation, likewise."""
    seconds: float = 0.0
    """Time of training, without evaluation."""
    images: int = 0
    """Images trained on, those of all processes."""
    teacher_record: dict[str, Any] | None = None
    """The teacher's accuracy before training, as it is recorded."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums of the values of this process's steps since the last record, and their `count`."""

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the values of one step, scalars on its device, to the sums."""
        count = torch.ones((), device=next(iter(values.values())).device)
        values = {"count": count, **values}
        self.sums = {name: self.sums[name] + value if name in self.sums else value for name, value in values.items()}

    def take_means(self, world: World) -> dict[str, float]:
        """Means over all steps and processes since the last call. Clears the sums."""
        count, *sums = world.mean(torch.stack([value.float() for value in self.sums.values()])).tolist()
        means = dict(zip(list(self.sums)[1:], (value / count for value in sums), strict=True))
        self.sums = {}
        return means

    def end_epoch(self, metrics: Mapping[str, Any], trained: bool = True) -> bool:
        """Take the metrics of an evaluation -> whether they are the best so far. If it `trained`, the epoch is over."""
        self.epoch, self.batch = self.epoch + trained, 0
        self.last = {"epoch": self.epoch, **metrics}
        name = metric_name(self.last)
        better = not self.best or self.last[name] > self.best[name]
        if better:
            self.best = self.last
        return better

    def stalled(self, patience: int | None) -> bool:
        """Whether the last `patience` epochs brought no better result; never without a `patience`."""
        return patience is not None and bool(self.best) and self.epoch - self.best["epoch"] >= patience

    def state_dict(self) -> dict[str, Any]:
        """The part that all processes share, under the names of the state on disk."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "update": self.update,
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
            "images_seen": self.images,
            "tried": self.teacher_record,
        }

    def load_state_dict(self, state: SavedState) -> None:
        self.epoch, self.batch, self.update = state.epoch, state.batch, state.update
        self.best, self.last = state.best, state.last
        self.seconds, self.images = state.seconds, state.images_seen
        self.teacher_record = state.tried
