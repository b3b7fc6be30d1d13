"""Loaders for runs that take turns: each batch is loaded once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

from irgdistill.data.loader import Loader


class TurnLoader:
    """A training loader for runs that take turns: loads a batch when the first asks for it, for all of them.

    The last two batches are kept, since a run that was stopped in its evaluation may be one turn behind the others.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader, self.images = loader, loader.images
        self.seconds = 0.0
        """Time of loading so far."""
        self._kept: dict[tuple[int, int], tuple[Any, ...] | None] = {}
        self._batches: Iterator[tuple[Any, ...]] = iter(())

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Any, ...]]:
        """As that of the loader."""
        for number in itertools.count(start):
            if (epoch, number) not in self._kept:
                self._load(epoch, number)
            batch = self._kept[epoch, number]
            if batch is None:
                return
            yield batch

    def _load(self, epoch: int, number: int) -> None:
        since, newest = time.perf_counter(), dict([*self._kept.items()][-1:])
        if (epoch, number - 1) not in newest:
            self._batches = self.loader.epoch(epoch, number)
        self._kept = {**newest, (epoch, number): next(self._batches, None)}
        self.seconds += time.perf_counter() - since

    def bottleneck(self, seconds: float, busy: float) -> None:
        """No advice: what is waited for is waited for once."""


class KeptLoader:
    """A validation loader whose batches, up to `gib` GiB of them, stay in memory: every run evaluates the same ones."""

    def __init__(self, loader: Loader, gib: float) -> None:
        self.loader, self.images, self.device = loader, loader.images, loader.device
        self._room = gib * 2**30
        self._kept: list[tuple[Any, ...]] | None = None

    def epoch(self) -> Iterator[tuple[Any, ...]]:
        """As that of the loader."""
        yield from self._read() if self._kept is None else self._kept

    def _read(self) -> Iterator[tuple[Any, ...]]:
        kept, room = list[tuple[Any, ...]](), self._room
        for batch in self.loader.epoch():
            room -= sum(part.nbytes for part in batch)
            if room >= 0:
                kept.append(batch)
            yield batch
        if room >= 0:
            self._kept = kept
