"""Two networks' levels -> a plan: which stages meet, which blocks are tapped, what is left out and why.

A level k holds the blocks whose map is 1/2^k of that network's own input, so stages of networks with different input
sizes meet. Deepest stages always meet, because they are nearest to the logits; a match that would cross that one is
dropped. A network with one level (a plain transformer) is split by depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from irgdistill.errors import UserError
from irgdistill.levels import Level, Tap


@dataclass(frozen=True)
class Pair:
    """One stage of the teacher and the stage of the student that learns from it."""

    name: str
    teacher: Level
    student: Level

    @property
    def has_transformation(self) -> bool:
        """Whether both networks offer a first and a last block of equal width here."""
        return all(s.entry is not None and s.entry.channels == s.exit.channels for s in (self.teacher, self.student))


@dataclass(frozen=True)
class Plan:
    """The stages that meet, in order of depth; the last is the one nearest to the logits."""

    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()

    def teacher_taps(self) -> list[Tap]:
        """All places tapped in the teacher."""
        return _unique(tap for pair in self.pairs for tap in (pair.teacher.entry, pair.teacher.exit))

    def student_taps(self, blocks: int = 1) -> list[Tap]:
        """All places tapped in the student, with the last `blocks` blocks of its last stage."""
        taps = [tap for pair in self.pairs for tap in (pair.student.entry, pair.student.exit)]
        return _unique([*taps, *self.student_tail(blocks)])

    def student_tail(self, blocks: int) -> tuple[Tap, ...]:
        """The student's last `blocks` block outputs of the last stage: the one-to-many side of the edges."""
        return self.pairs[-1].student.blocks[-blocks:]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's metadata."""
        return asdict(self)


def match(teacher: Sequence[Level], student: Sequence[Level]) -> Plan:
    """Match the levels of two networks. Raises UserError when either has none."""
    if not teacher or not student:
        raise UserError(f"the {'teacher' if not teacher else 'student'} has no stage that can be tapped")
    teacher, student = list(teacher), list(student)
    notes: list[str] = []
    if len(teacher) == 1 or len(student) == 1:
        count = max(len(teacher), len(student)) if len(teacher) != len(student) else 4
        teacher, student = _by_depth(teacher, count), _by_depth(student, count)
        count = min(len(teacher), len(student))
        notes.append(f"matched by depth in {count} parts: a network of one resolution has no levels to compare")
        matched = list(zip(teacher[-count:], student[-count:], strict=True))
    else:
        matched = _by_level(teacher, student, notes)
    pairs = tuple(Pair(_name(t, s, i), t, s) for i, (t, s) in enumerate(matched))
    for pair in pairs:
        if not pair.has_transformation:
            side = "teacher" if not Pair("", pair.teacher, pair.teacher).has_transformation else "student"
            notes.append(f"{pair.name}: no transformation, the {side} has no two taps of equal width there")
    return Plan(pairs, tuple(notes))


def _by_level(teacher: list[Level], student: list[Level], notes: list[str]) -> list[tuple[Level, Level]]:
    last_t, last_s = teacher[-1], student[-1]
    by_level = {level.level: level for level in student[:-1]}
    pairs = [(t, by_level[t.level]) for t in teacher[:-1] if t.level in by_level]
    if len(teacher) > 1 and len(student) > 1 and last_t.level != last_s.level:
        notes.append(f"last stages meet although /{2**last_t.level} and /{2**last_s.level} differ")
    kept = {id(level) for pair in [*pairs, (last_t, last_s)] for level in pair}
    for role, levels in (("teacher", teacher), ("student", student)):
        for level in levels:
            if id(level) not in kept:
                notes.append(f"{role} /{2**level.level} ({level.exit.module}) has no counterpart")
    return [*pairs, (last_t, last_s)]


def _by_depth(levels: list[Level], count: int) -> list[Level]:
    """Split a network of one level into `count` groups of consecutive blocks; others stay as they are."""
    if len(levels) != 1:
        return levels
    blocks = levels[0].blocks
    count = min(count, len(blocks))
    bounds = [round(i * len(blocks) / count) for i in range(count + 1)]
    groups = [blocks[a:b] for a, b in pairwise(bounds)]
    return [replace(levels[0], entry=g[0] if len(g) > 1 else None, exit=g[-1], blocks=g) for g in groups]


def _name(teacher: Level, student: Level, index: int) -> str:
    return f"/{2**student.level}" if teacher.level == student.level else f"stage{index + 1}"


def _unique(taps: Any) -> list[Tap]:
    return list(dict.fromkeys(tap for tap in taps if tap is not None))
