"""Measures how long training waits for images, and advises once if that is long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from irgdistill.runtime import cores

SHARE = 0.1
"""Share of the training time from which waiting is worth advice."""


STRETCH = 10.0
"""Seconds of training over which the share is measured."""


class WaitMeter:
    """Seconds that the consumer of a loader waits for its batches."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.waited = 0.0
        self._seconds = self._busy = 0.0
        self._started = self._advised = False

    def measured(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; the time that each takes is counted."""
        iterator = iter(batches)
        while True:
            since = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - since
            yield batch

    def advice(self, seconds: float, busy: float, ignore: bool = False) -> str | None:
        """Advice, once, if data loading took more than SHARE of the training time.

        Call it every `seconds`, of which the device was still `busy` for some after it had been given all its work.
        The first call is ignored, as workers are started before it; `ignore` skips another.
        """
        if ignore or not self._started:
            self._started, self.waited = True, 0.0
            return None
        self._seconds, self._busy = self._seconds + seconds, self._busy + busy
        if self._seconds < STRETCH:
            return None
        share, device = self.waited / self._seconds, self._busy / self._seconds
        self.waited = self._seconds = self._busy = 0.0
        if self._advised or share < SHARE or 2 * device > SHARE:
            return None
        self._advised = True
        count = cores()
        remedy = "smaller files or a faster disk may help"
        if self.workers < count - 1:
            remedy = "more --workers may help"
        return f"data loading took {share:.0%} of training time: {remedy} (--workers {self.workers}, {count} cores)"
