"""Reports of a run: log lines and tables on the terminal, a progress bar, records in metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from irgdistill.io.metrics_file import MetricsFile, records
from irgdistill.io.progress_bar import ProgressBar
from irgdistill.io.text import visible

LINE_EVERY = 30.0
"""Seconds between two progress lines within an epoch, where no bar is shown."""


NARROW = 72
"""Tables on terminals of fewer columns have no gap between theirs."""


_quiet = ContextVar("quiet", default=False)
"""Set by --quiet. Every `Report` of the command reads it, wherever it was made."""


@contextmanager
def quiet_console(quiet: bool = True) -> Iterator[None]:
    """Show only results, warnings and errors on stderr: no log, progress bar or table."""
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


class Report:
    """Terminal output and metrics file of one run.

    It writes to stderr, which leaves stdout to results. With `quiet` it does nothing: of many processes one reports.
    Every text is one line: hidden characters are shown as escapes, and nothing in it is markup.
    """

    def __init__(
        self, metrics: Path | None = None, stdout: bool = False, quiet: bool = False, name: str | None = None
    ) -> None:
        """`name` begins every line of a run that is trained beside others."""
        self._name = "" if name is None else f"{name}: "
        self.console = Console(stderr=not stdout, highlight=False, quiet=quiet)
        self.listener: Callable[[Mapping[str, Any]], None] | None = None
        """Called with every record, such as by loggers."""
        self._metrics = None if metrics is None or quiet else MetricsFile(metrics, self.warn)
        self._bar: ProgressBar | None = None
        self._last_line = time.monotonic()

    def line(self, text: str) -> None:
        """Write one line of the log."""
        if not (_quiet.get() and self.console.stderr):
            self.result(text)

    def result(self, text: str) -> None:
        """Write one line of the command's result."""
        self.console.print(visible(self._name + text), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Write one warning."""
        self.console.print(f"warning: {visible(self._name + text)}", markup=False, soft_wrap=True, style="yellow")

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        if self._metrics is not None:
            written = self._metrics.append(values)
            if self.listener is not None:
                self.listener(written)

    def recorded(self) -> list[dict[str, Any]]:
        """Records of metrics.jsonl so far."""
        return [] if self._metrics is None else records(self._metrics.path)

    def mark(self) -> dict[str, int]:
        """End of metrics.jsonl, whose content is then safely on disk. Raises OSError."""
        return {} if self._metrics is None else self._metrics.mark()

    def rewind(self, mark: Mapping[str, int]) -> None:
        """Drop the records written after `mark`."""
        if self._metrics is not None:
            self._metrics.rewind(mark)

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        """Show a bar over `total` batches, if this is a terminal."""
        if not self.console.is_terminal or self.console.quiet or _quiet.get():
            yield
            return
        with ProgressBar(self.console, total, done) as self._bar:
            yield
        self._bar = None

    def advance(self, done: int, epoch: str, terms: Mapping[str, float], images_per_second: float) -> None:
        """Show the position of the run; called at every log interval."""
        parts = [*(f"{name} {value:.3g}" for name, value in terms.items()), f"{images_per_second:,.0f} img/s"]
        number, _, accuracy = epoch.partition("  ")
        if self._bar is not None:
            self._bar.show(done, number, [part for part in (accuracy, *parts) if part])
        elif time.monotonic() - self._last_line > LINE_EVERY:
            self._last_line = time.monotonic()
            self.line("  ".join([number, *parts]))  # the line above has the accuracy


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stdout: bool = True) -> None:
    """Print a small table of plain text, never markup. On a narrow terminal, cells break at the ±."""
    if _quiet.get() and not stdout:
        return
    console = Console(stderr=not stdout)
    gap = int(console.width >= NARROW)
    if gap:
        rows = [[cell.replace(" ± ", "±") for cell in row] for row in rows]
    heading = Text(visible(title), style="table.title") if title else None
    view = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False)
    for i, column in enumerate(columns):
        number = all(row[i][:1].isdigit() or row[i][:1] in "–-+" for row in rows)
        view.add_column(Text(visible(column)), justify="right" if number and i else "left", overflow="fold")
    for row in rows:
        view.add_row(*(Text(visible(cell)) for cell in row))
    console.print(view)
