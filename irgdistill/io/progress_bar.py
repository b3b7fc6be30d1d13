"""Progress bar of a run. rich alone shows one line per bar; here the current losses stand below it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

UNBROKEN = "\0"
"""Replaces spaces at which a line must not break."""


class ProgressBar(Progress):
    """A bar over the batches of a run, with lines of text below it."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.below = ""
        super().__init__(*columns, console=console, speed_estimate_period=120)
        self._bar = self.add_task("starting", total=total, completed=done)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.below)

    def show(self, done: int, description: str, values: Sequence[str]) -> None:
        """Move the bar. `values`, such as `loss 1.2`, are wrapped below it, none of them broken."""
        text = "  ".join(value.replace(" ", UNBROKEN) for value in values)
        self.below = textwrap.fill(text, self.console.width).replace(UNBROKEN, " ")
        self.update(self._bar, completed=done, description=description)
