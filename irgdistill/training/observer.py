"""The interface of what watches a run, such as a logger."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from irgdistill.matching import Tapped


class Observer(Protocol):
    """Watches a run while it trains; `Trainer.fit` enters and leaves it."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def epoch_ended(self, teacher: Tapped | None, student: Tapped, epoch: int) -> None:
        """After every evaluation, and once with `epoch` 0 before training."""
