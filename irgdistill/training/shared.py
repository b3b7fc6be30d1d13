"""What runs that take turns on the same batches share: loaders, caches and live teachers, each used once a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from irgdistill.data import KeptLoader, Loader, TurnLoader, UnreadableImages
from irgdistill.matching import Tap
from irgdistill.training.teacher_cache import TeacherCache
from irgdistill.training.teachers import LiveTeacher

Taps = Mapping[str, Sequence[Tap]]


class RememberingView(nn.Module):
    """Preprocessing (B, 3, H, W) -> (B, 3, h, w) that keeps its last result, for runs that take turns."""

    def __init__(self, view: nn.Module) -> None:
        super().__init__()
        self.view = view
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not images:
            self._last = images, self.view(images)
        return self._last[1]


class SharedParts:
    """The parts of a run that others use too. Each is made by the first run that asks for it.

    Only for runs with the same images, views and seed, built one after the other; those with a teacher come first.
    """

    def __init__(self) -> None:
        self.train: TurnLoader | None = None
        self.unreadable: UnreadableImages | None = None
        self._kept: dict[str, KeptLoader] = {}
        self._caches: dict[Path, tuple[TeacherCache, dict[str, list[Tap]]]] = {}
        self._live: dict[Any, LiveTeacher] = {}
        self._view: RememberingView | None = None

    def train_loader(self, make: Callable[[], Loader]) -> TurnLoader:
        if self.train is None:
            self.train = TurnLoader(make())
        return self.train

    def validation_loader(self, what: str, gib: float, make: Callable[[], Loader]) -> KeptLoader:
        """`what` tells loaders of different images apart."""
        if what not in self._kept:
            self._kept[what] = KeptLoader(make(), gib)
        return self._kept[what]

    def cache(self, cache: TeacherCache, taps: Taps) -> TeacherCache:
        """The cache of that folder; `open` reads what all runs need of it."""
        shared, wanted = self._caches.setdefault(cache.folder, (cache, {}))
        for kind, needed in taps.items():
            wanted.setdefault(kind, []).extend(needed)
        return shared

    def teacher(self, number: int, taps: Taps, embedding: str | None, make: Callable[[], LiveTeacher]) -> LiveTeacher:
        """A live teacher: one for all runs that need the same of it, whose forward pass is run once a batch."""
        key = (number, tuple((kind, tuple(needed)) for kind, needed in taps.items()), embedding)
        if key not in self._live:
            self._live[key] = make()
        return self._live[key]

    def student_view(self, view: nn.Module) -> RememberingView:
        """The preprocessing of the student, which all runs have in common."""
        self._view = self._view or RememberingView(view)
        return self._view

    def open(self) -> None:
        """Open the caches, once all runs are built. Raises UserError for a damaged one."""
        for cache, wanted in self._caches.values():
            cache.open(wanted)
