"""metrics.jsonl: appends one record per line, survives a full disk and returns to a saved position."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from irgdistill.io.atomic import sync
from irgdistill.io.record import Number, Record

Count = Annotated[int, Field(ge=0, lt=2**63)]


class MetricsRecord(Record):
    """Numbers of one kind, such as `train` or `eval`, by name or in groups."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)
    __pydantic_extra__: dict[str, Number | dict[str, Number]]
    kind: str
    epoch: Count = 0
    update: Count = 0


def records(path: Path) -> list[dict[str, Any]]:
    """Records of a file; [] if it is missing. Damaged lines are skipped."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValidationError):
            found.append(MetricsRecord.model_validate_json(line).model_dump(exclude_unset=True))
    return found


class MetricsFile:
    """Records of one file. Those that cannot be written are kept and tried again with the next."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._waiting = b""
        self._length = self._checksum = 0
        self._failed = False

    def append(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Add one record, its numbers rounded to 7 digits -> the record as written. Warns once if the disk is full."""
        rounded: Mapping[str, Any] = _rounded(record)
        self._waiting += json.dumps(rounded).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._failed:
                self._warn(f"{self.path} cannot be written ({error.strerror}); its records are kept and written later")
            self._failed = True
        return rounded

    def mark(self) -> dict[str, int]:
        """Length in bytes and CRC-32 of the file, now safely on disk. Raises OSError."""
        self._flush()
        if self._length:
            sync(self.path)
            sync(self.path.parent)
        return {"bytes": self._length, "crc32": self._checksum}

    def rewind(self, mark: Mapping[str, int]) -> None:
        """Drop what was written after `mark`. Warns about a file that does not begin as it did then, and keeps it."""
        content = self.path.read_bytes() if self.path.exists() else b""
        length = mark.get("bytes", 0)
        kept = content[:length]
        if len(kept) < length or zlib.crc32(kept) != mark.get("crc32"):
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


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return value
