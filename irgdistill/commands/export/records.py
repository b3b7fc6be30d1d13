"""What a model card reads of the files of a run and a comparison."""

from __future__ import annotations

from irgdistill.io import Record


class ComparedMethod(Record):
    """A row of compare.json."""

    method: str
    seeds: tuple[int, ...]


class Comparison(Record):
    """What the card reads of compare.json."""

    rows: tuple[ComparedMethod, ...]
    teacher_top1: float | None
    validation_images: int


class TeacherCheck(Record):
    """The teacher's accuracy before training, as metrics.jsonl records it."""

    top1: float
    images: int
