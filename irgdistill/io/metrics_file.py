"""metrics.jsonl: records appended a line each, through full disks and back to where a state was saved."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from irgdistill.io.atomic import sync


def records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, of none where it is missing; damaged lines are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and "kind" in record]


class Journal:
    """Lines of one file. What cannot be written is kept and tried again with the next line."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._waiting = b""
        self._length = self._checksum = 0
        self._failed = False

    def append(self, line: str) -> None:
        """Add one line; says so once when the disk does not take it."""
        self._waiting += line.encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._failed:
                self._warn(f"{self.path} cannot be written ({error.strerror}); its records are kept and tried again")
            self._failed = True

    def mark(self) -> dict[str, int]:
        """Length in bytes and CRC-32 of what is now safely on disk. Raises OSError when something is not."""
        self._flush()
        if self._length:
            sync(self.path)
            sync(self.path.parent)
        return {"bytes": self._length, "crc32": self._checksum}

    def rewind(self, mark: Mapping[str, int]) -> None:
        """Forget what was written after `mark`. A file that is not the one of then is kept as it is, with a warning."""
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = content[: mark["bytes"]]
        if len(kept) < mark["bytes"] or zlib.crc32(kept) != mark["crc32"]:
            self._warn(f"{self.path} is missing, cut short or changed since the state was saved: it has a gap")
            kept = kept[: kept.rfind(b"\n") + 1]
        if len(kept) < len(content):
            os.truncate(self.path, len(kept))
        self._length, self._checksum = len(kept), zlib.crc32(kept)

    def _flush(self) -> None:
        if not self._waiting:
            return
        try:
            with open(self.path, "ab") as file:
                file.write(self._waiting)
        except OSError:
            if self.path.exists():
                os.truncate(self.path, self._length)
            raise
        self._length += len(self._waiting)
        self._checksum = zlib.crc32(self._waiting, self._checksum)
        self._waiting, self._failed = b"", False
