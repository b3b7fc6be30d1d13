"""What a run says: progress on a terminal, plain lines elsewhere, metrics.jsonl on disk."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from irgdistill.io.metrics_file import Journal, records

LINE_EVERY = 30.0
"""Seconds between two lines of the plain log within an epoch."""


JOINT = "\0"


NARROW = 72
"""Columns of a terminal below which those of a table stand closer."""


_hushed = False


@contextmanager
def hushed(wanted: bool = True) -> Iterator[None]:
    """Within, stderr gets results, warnings and errors only: no log, no progress, no table."""
    global _hushed
    before, _hushed = _hushed, wanted
    try:
        yield
    finally:
        _hushed = before


class _Bar(Progress):
    """A progress bar with a line of text below it."""

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.below)


class Report:
    """Terminal (stderr, so that stdout stays for results) and metrics file of one run.

    Of many processes one speaks and writes; the others, `quiet`, keep silent.
    """

    def __init__(self, metrics: Path | None = None, stdout: bool = False, quiet: bool = False) -> None:
        self.console = Console(stderr=not stdout, highlight=False, quiet=quiet)
        self._journal = None if metrics is None or quiet else Journal(metrics, self.warn)
        self.listener: Callable[[Mapping[str, Any]], None] | None = None
        """Is given every record as well."""
        self._progress: _Bar | None = None
        self._task: TaskID | None = None
        self._last_line = time.monotonic()

    def line(self, text: str) -> None:
        """One line of log."""
        if not (_hushed and self.console.stderr):
            self.result(text)

    def result(self, text: str) -> None:
        """One line of what the command is for."""
        self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that stands out."""
        self.console.print(f"warning: {text}", markup=False, soft_wrap=True, style="yellow")

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        if self._journal is not None:
            values = _rounded(values)
            self._journal.append(json.dumps(values))
            if self.listener is not None:
                self.listener(values)

    def recorded(self) -> list[dict[str, Any]]:
        """Records of metrics.jsonl."""
        return [] if self._journal is None else records(self._journal.path)

    def mark(self) -> dict[str, int]:
        """Where metrics.jsonl ends, everything before it being on the disk. Raises OSError."""
        return {} if self._journal is None else self._journal.mark()

    def rewind(self, mark: Mapping[str, int]) -> None:
        """Forget records written after a state was saved."""
        if self._journal is not None:
            self._journal.rewind(mark)

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        """A bar over `total` batches of the run, on a terminal."""
        if not self.console.is_terminal or self.console.quiet or _hushed:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with _Bar(*columns, console=self.console, speed_estimate_period=120) as self._progress:
            self._task = self._progress.add_task("starting", total=total, completed=done)
            yield
        self._progress = None

    def advance(self, done: int, epoch: str, terms: Mapping[str, float], images_per_second: float) -> None:
        """Show where the run is; called at every log interval."""
        parts = [*(f"{name} {value:.3g}" for name, value in terms.items()), f"{images_per_second:,.0f} img/s"]
        if self._progress is not None and self._task is not None:
            number, _, accuracy = epoch.partition("  ")
            whole = [part.replace(" ", JOINT) for part in (accuracy, *parts) if part]  # a value stays with its name
            self._progress.below = textwrap.fill("  ".join(whole), self.console.width).replace(JOINT, " ")
            self._progress.update(self._task, completed=done, description=number)
        elif time.monotonic() - self._last_line > LINE_EVERY:
            self._last_line = time.monotonic()
            self.line("  ".join([epoch, *parts]))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stdout: bool = True) -> None:
    """A small table on the terminal. Where a narrow one makes lines break, they break at the ±."""
    if _hushed and not stdout:
        return
    console = Console(stderr=not stdout)
    gap = int(console.width >= NARROW)
    if gap:
        rows = [[cell.replace(" ± ", "±") for cell in row] for row in rows]
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False)
    for i, column in enumerate(columns):
        number = all(row[i][:1].isdigit() or row[i][:1] in "–-" for row in rows)
        view.add_column(column, justify="right" if number and i else "left", overflow="fold")
    for row in rows:
        view.add_row(*row)
    console.print(view)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return value
