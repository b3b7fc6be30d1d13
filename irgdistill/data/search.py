"""The search for image files: counts and names what it leaves out, shows progress, and gives up at a bound."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from irgdistill.data.decoding import is_image_name
from irgdistill.errors import UserError, os_reason
from irgdistill.io import Report
from irgdistill.runtime import is_worker

REPORT_EVERY = 5.0
"""Seconds between two lines about a search under way."""


IMAGES_EACH = 10
"""Other files that are allowed for each image found, beyond the limit."""


class ImageSearch:
    """Looks for images in folders or in lists of names. Hidden files and folders count for nothing.

    Raises UserError after `limit` files and folders without an image (more where there are images).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.images = self.others = 0
        self.left_out: Counter[str] = Counter()
        """Number of files by their ending, or by what is wrong with them."""
        self.special: list[str] = []
        """What has the name of an image and is no regular file, and folders that cannot be read."""
        self._next_report = time.monotonic() + REPORT_EVERY

    def __str__(self) -> str:
        """What was left out, such as `12 files left out: 9 .txt, 3 without ending`; empty for nothing."""
        shown = self.left_out.most_common(8)
        parts = [f"{count:,} {kind}" for kind, count in shown]
        if others := sum(self.left_out.values()) - sum(count for _, count in shown):
            parts.append(f"{others:,} others")
        if self.special:
            more = f" and {len(self.special) - 3:,} more" if len(self.special) > 3 else ""
            parts.append(f"{', '.join(self.special[:3])}{more}")
        count = sum(self.left_out.values()) + len(self.special)
        return f"{count:,} file{'s' * (count != 1)} left out: {', '.join(parts)}" if count else ""

    def take(self, name: str, regular: Callable[[], bool] = lambda: True) -> bool:
        """Whether a file is an image, by its name; `regular` tells whether it is a regular file. Counts it."""
        base = os.path.basename(name)
        if base.startswith("."):
            return False
        if not is_image_name(base):
            self.left_out[os.path.splitext(base)[1].lower() or "without ending"] += 1
            return False
        if not regular():
            self.special.append(f"{name} (no regular file)")
            return False
        self.images += 1
        return True

    def walk(self, root: Path, below: bool = True) -> Iterator[str]:
        """Paths of the images in a folder and, unless `below` is false, in all folders below it.

        A folder is entered once, whatever links lead to it.
        """
        pending, entered = [str(root)], set()
        while pending:
            folder = pending.pop()
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in entered:
                    continue
                entered.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                self.special.append(f"{folder} ({os_reason(error)})")
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _holds(entry.is_dir):
                    pending += [entry.path] * below
                elif self.take(entry.path, partial(_holds, entry.is_file)):
                    yield entry.path
                    continue
                self._count_other(root)

    def _count_other(self, root: Path) -> None:
        self.others += 1
        if self.others > max(self.limit, IMAGES_EACH * self.images):
            raise UserError(
                f"looked at {self.others:,} files and folders in {root} that are no images, and found {self.images:,} "
                "images: name the folder that holds the images, or raise data.search_limit"
            )
        if time.monotonic() > self._next_report:
            self._next_report = time.monotonic() + REPORT_EVERY
            report = Report(quiet=is_worker())
            report.line(f"looking for images in {root}: {self.images:,} found, {self.others:,} other files and folders")


def _holds(test: Callable[[], bool]) -> bool:
    """The answer of `DirEntry.is_file` or `is_dir`; no for a link that leads to itself."""
    try:
        return test()
    except OSError:
        return False
