"""A process that another one started for its work ends with it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "IRGDISTILL_PARENT"
"""Environment variable of a process that is to end with its parent: the parent's number."""


PR_SET_PDEATHSIG = 1
"""Option of prctl(2): the signal that the system sends to this process when its parent ends."""


POLL = 1.0
"""Seconds between two looks at the parent where the system does not report its end."""


def lifeline() -> dict[str, str]:
    """The environment of a child that calls `end_with_parent`."""
    return {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Kill this process as soon as the one that gave it a `lifeline` is gone. Does nothing without one.

    A run is safe at any point of its work, so nothing is saved first.
    """
    parent = int(os.environ.pop(PARENT, 0))  # not for the children of this process
    if not parent or not hasattr(signal, "SIGKILL"):
        return
    watched = sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0
    if os.getppid() != parent:  # it ended before the system knew
        _end()
    if not watched:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
