"""SIGINT and SIGTERM: handled between two updates, or at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal ends the command at once. Derives from BaseException, so that no `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """A context in which SIGINT and SIGTERM raise `Stopped`; if `patient`, the first is only stored in `received`."""

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.received: int | None = None

    def __enter__(self) -> Signals:
        self._owner = os.getpid()
        self._before = {number: signal.signal(number, self._take) for number in NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._owner:
            return  # a forked loader worker: its parent handles the signal
        first, self.received = self.received is None, number
        if not (first and self.patient):
            raise Stopped(number)

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """A context in which the first signal raises `Stopped` too, for work that can be abandoned at any point."""
        if self.received is not None:
            raise Stopped(self.received)
        before, self.patient = self.patient, False
        try:
            yield
        finally:
            self.patient = before


def block_signals() -> None:
    """Let SIGINT and SIGTERM wait in this process, on systems that can."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)


def ignore_signals(_worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a loader worker: the parent handles them and still needs the worker.

    A SIGTERM sent by the parent still ends it, on systems that tell the sender.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = parent_process()  # not `os.getppid`, which may be the server that forked this process
        threading.Thread(target=_await_parent, args=(parent.pid if parent else None,), daemon=True).start()


def _await_parent(owner: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != owner:
        pass
    os._exit(0)
