"""Facts that a setting's annotation declares besides its type: its option, and whether a resumed run may change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NETWORKS, DATA, MATCHING, METHOD, TRAINING, RUN, RESULT = PANELS = (
    *("Networks", "Data", "Matching", "Method", "Training", "Run", "Result"),
)
"""Panels of the help, in their order."""


@dataclass(frozen=True)
class Flag:
    """The option of `distill` that sets a setting."""

    name: str
    """Such as `--lr`; `{section}` is replaced by the first word of the setting's key."""
    panel: str
    help: str
    """One short sentence; the help appends the default and replaces `{names}` by the data sources or loggers."""
    completion: Literal["logger", "method", "network", "source"] | None = None
    """The names that the shell completes."""
    off: bool = False
    """The option turns the setting off, as `--no-labels` does."""
    repeated: bool = False
    """Each use of the option adds a value; of a setting of the teacher, that of one more teacher."""
    metavar: str = ""
    """What the value is, such as `DIR` or `A,B,C`; default: by the setting's type."""
    common: bool = False
    """Many runs need it: `--help` shows it, where it leaves others to `--help-all`."""

    @property
    def parameter(self) -> str:
        """Name of the option in Python, such as `weight_decay`."""
        return self.name.lstrip("-").replace("-", "_")


class Changeable:
    """Marks a setting that a resumed run may change: where things are and when they are saved, never a result."""


CHANGEABLE = Changeable()
