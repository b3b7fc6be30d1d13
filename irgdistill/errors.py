"""How a command ends early: bad input is one line and exit code 2, a signal its own code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line: what was given, what is allowed, the remedy."""


class Interrupted(Exception):
    """The command ends early with exit code `code`: a signal asked for it, or a worker failed. The message says why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`"; did you mean a, b?"` with the names closest to `given`, or an empty string when none is close."""
    lowered = {name.lower(): name for name in allowed}
    close = difflib.get_close_matches(given.lower(), lowered, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(lowered[name] for name in close)}?" if close else ""
