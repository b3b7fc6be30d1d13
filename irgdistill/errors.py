"""Errors that end a command: bad input is one line and exit code 2, a signal has its own code."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Bad input: options, settings, files. The message is one line: what was given, what is allowed, the remedy."""


class DataError(UserError):
    """Data that cannot be read: a damaged file, too many unreadable images."""


class TrainingError(UserError):
    """An accident while training, such as a loss that is not finite or a full disk."""


class Interrupted(Exception):
    """Ends the command early with exit code `code`, after a signal or a worker's failure. The message is the reason."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`"; did you mean a, b?"` with the names that begin with `given` or are close, or an empty string."""
    lowered = {name.lower(): name for name in allowed}
    begun = [name for name in lowered if len(given) > 2 and name.startswith(given.lower())]
    close = dict.fromkeys([*begun, *difflib.get_close_matches(given.lower(), lowered, n=3, cutoff=0.5)])
    return f"; did you mean {', '.join(lowered[name] for name in [*close][:3])}?" if close else ""


def nearest_path(given: str) -> str:
    """As `nearest`: the names beside the first folder or file of the path `given` that does not exist."""
    path = Path(given)
    while not path.parent.is_dir() and path != path.parent:
        path = path.parent
    try:
        return nearest(path.name, [beside.name for beside in path.parent.iterdir() if beside.name != path.name])
    except OSError:
        return ""


def one_line(error: object, length: int | None = None) -> str:
    """The message of `error` on one line, cut at a word to `length` characters; its type if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if length is None else textwrap.shorten(text, length, placeholder="…")


def os_reason(error: OSError) -> str:
    """The reason of a failed system call with its file, such as `No such file or directory: a/b`."""
    return f"{error.strerror or one_line(error)}" + (f": {error.filename}" if error.filename else "")
