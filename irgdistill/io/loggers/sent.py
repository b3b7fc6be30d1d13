"""What a run has sent to a service that takes nothing back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from irgdistill.io.atomic import write_text
from irgdistill.io.record import Record


class SentRecord(Record):
    """The file of `Sent`."""

    id: Annotated[str, Field(min_length=1)] | None
    given: Mapping[str, int]


class Sent:
    """What was sent to a service that takes nothing back, in the file `path`, RUN/NAME.json: a resumed run reads it, a
    run that is begun anew deletes it.

    It holds the `id` of the service's run, None before there is one, and the last update of each kind of record.
    Raises UserError for a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        saved = SentRecord.from_json(path) if path.exists() else SentRecord(id=None, given={})
        self.id = saved.id
        self._last = dict(saved.given)

    def is_new(self, kind: str, step: int) -> bool:
        """Whether the records of this kind and update are still to be sent."""
        return step > self._last.get(kind, -1)

    def save(self, kind: str | None = None, step: int = 0) -> None:
        """Write the file, after records of this `kind` and update were sent. Raises OSError."""
        if kind is not None:
            self._last[kind] = step
        write_text(self._path, SentRecord(id=self.id, given=self._last).model_dump_json())
