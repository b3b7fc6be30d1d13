"""SIGINT and SIGTERM: taken at a moment that loses nothing, or at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal ends the command at once. No `except Exception` on the way takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """A context in which SIGINT and SIGTERM raise `Stopped`; if it is `patient`, the first is only noted in `asked`."""

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.asked: int | None = None

    def __enter__(self) -> Signals:
        self._owner = os.getpid()
        self._before = {number: signal.signal(number, self._take) for number in NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._owner:
            return  # a forked loader process: its parent decides
        first, self.asked = self.asked is None, number
        if not (first and self.patient):
            raise Stopped(number)

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Within, the first signal raises `Stopped` too: for work that can be left at any point."""
        if self.asked is not None:
            raise Stopped(self.asked)
        before, self.patient = self.patient, False
        try:
            yield
        finally:
            self.patient = before


def leave_to_parent(_worker: int) -> None:
    """In a loader process: a signal to all processes of a job is its parent's to answer, which needs it to the end.

    The SIGTERM by which the parent itself ends it still counts (where the system tells the sender).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
