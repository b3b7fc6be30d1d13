"""Matches the stages of two networks: which stages are compared, which blocks are tapped, what is skipped and why.

Level k holds the blocks whose map is 1/2^k of that network's own input, so networks with different input sizes can be
matched. The deepest stages are always matched, because they are nearest to the logits; a match that would cross that
one is dropped. Levels finer than /4, which encode edges and colours, are skipped if two others remain. A network with
one level (a plain transformer) is split by depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from irgdistill.config import MatchingConfig
from irgdistill.errors import UserError, nearest
from irgdistill.matching.levels import Level, Tap

FINEST = 2
"""Finer levels than this one (/4) are skipped if two others remain."""


DEPTH_GROUPS = 4
"""Stages of two networks with one resolution each."""


Ends = tuple[Tap, Tap]


@dataclass(frozen=True)
class Pair:
    """One stage of the teacher and the stage of the student that learns from it."""

    name: str
    teacher: Level
    student: Level

    def transformation(self) -> tuple[Ends, Ends] | None:
        """First and last tap of equal width, of teacher and student; None if either network has no such two."""
        teacher, student = ends(self.teacher), ends(self.student)
        return (teacher, student) if teacher is not None and student is not None else None


@dataclass(frozen=True)
class Plan:
    """The matched stages in order of depth; the last is the one nearest to the logits."""

    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()

    def teacher_taps(self) -> list[Tap]:
        """All taps in the teacher."""
        return _taps(pair.teacher for pair in self.pairs)

    def student_taps(self, blocks: int = 1) -> list[Tap]:
        """All taps in the student, with the last `blocks` blocks of its last stage."""
        return list(dict.fromkeys([*_taps(pair.student for pair in self.pairs), *self.student_tail(blocks)]))

    def student_tail(self, blocks: int) -> tuple[Tap, ...]:
        """The student's last `blocks` block outputs of the last stage: the one-to-many side of the edges."""
        return self.pairs[-1].student.blocks[-blocks:]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's metadata."""
        return asdict(self)


def ends(level: Level) -> Ends | None:
    """First and last tap of equal width in a stage: the entry, and the exit or the last block as wide."""
    if level.entry is None:
        return None
    for tap in (level.exit, *reversed(level.blocks)):
        if tap.channels == level.entry.channels and tap != level.entry:
            return level.entry, tap
    return None


def match(teacher: Sequence[Level], student: Sequence[Level], config: MatchingConfig | None = None) -> Plan:
    """Match the levels of two networks. Raises UserError: no level left, or a requested one does not exist."""
    config = config or MatchingConfig()
    notes: list[str] = []
    requested = {"teacher": config.taps_teacher, "student": config.taps_student}
    sides = {}
    for role, levels in (("teacher", teacher), ("student", student)):
        kept = [level for level in levels if 2**level.level not in config.skip]
        if not kept:
            raise UserError(f"the {role} has no stage {'left' if levels else 'that can be tapped'}")
        sides[role] = _by_name(levels, requested[role], role) if requested[role] else kept
    _check_skip(config.skip, [*teacher, *student])
    matched = _match_stages(sides["teacher"], sides["student"], config, notes)
    pairs = tuple(Pair(_name(t, s, i), t, s) for i, (t, s) in enumerate(matched))
    for pair in pairs:
        for role, level in (("teacher", pair.teacher), ("student", pair.student)):
            if ends(level) is None:
                notes.append(f"{pair.name}: no transformation, the {role} has no two taps of equal width there")
    return Plan(pairs, tuple(notes))


def _match_stages(
    teacher: list[Level], student: list[Level], config: MatchingConfig, notes: list[str]
) -> list[tuple[Level, Level]]:
    by_name = bool(config.taps_teacher or config.taps_student)
    if config.taps_teacher and config.taps_student and len(teacher) != len(student):
        raise UserError(f"{len(teacher)} teacher taps and {len(student)} student taps: give the same number of each")
    if not by_name and config.levels is None and len(teacher) > 1 and len(student) > 1:
        matched = _by_level(teacher, student, notes)
        if len(matched) > 1:
            return matched
    if not by_name:
        both_flat = len(teacher) == len(student) == 1
        count = config.levels or (DEPTH_GROUPS if both_flat else max(len(teacher), len(student)))
        teacher, student = _by_depth(teacher, count), _by_depth(student, count)
    count = min(config.levels or len(teacher), len(teacher), len(student))
    notes.append(f"matched {'by name' if by_name else 'by depth'} in {count} stage{'s' if count > 1 else ''}")
    return list(zip(teacher[-count:], student[-count:], strict=True))


def _by_level(teacher: list[Level], student: list[Level], notes: list[str]) -> list[tuple[Level, Level]]:
    by_level = {level.level: level for level in student[:-1]}
    last = teacher[-1], student[-1]
    pairs = [(level, by_level[level.level]) for level in teacher[:-1] if level.level in by_level]
    coarse = [pair for pair in pairs if pair[0].level >= FINEST]
    dropped = [pair[0].level for pair in pairs if pair not in coarse] if coarse else []
    pairs = [*(coarse or pairs), last]
    if last[0].level != last[1].level:
        notes.append(f"the last stages meet although /{2 ** last[0].level} and /{2 ** last[1].level} differ")
    notes += [f"/{2**level} is left out: finer than /{2**FINEST}" for level in dropped]
    kept = {id(level) for pair in pairs for level in pair}
    for role, levels in (("teacher", teacher), ("student", student)):
        for level in levels:
            if id(level) not in kept and level.level not in dropped:
                notes.append(f"{role} /{2**level.level} ({level.exit.module}) has no counterpart")
    return pairs


def _by_depth(levels: list[Level], count: int) -> list[Level]:
    """Split a network of one level into `count` groups of consecutive blocks; other networks are not changed.

    Of parallel branches with different widths (crossvit), only the blocks of the last one count.
    """
    if len(levels) != 1:
        return levels
    blocks = tuple(tap for tap in levels[0].blocks if tap.channels == levels[0].exit.channels)
    count = min(count, len(blocks))
    if count == 1:
        return levels
    bounds = [round(i * len(blocks) / count) for i in range(count + 1)]
    return [_stage(levels[0], blocks[start:end], blocks[:start][-1:]) for start, end in pairwise(bounds)]


def _by_name(levels: Sequence[Level], names: Sequence[str], role: str) -> list[Level]:
    """Stages that end at the named blocks, each starting after the previous one."""
    blocks = [(level, tap) for level in levels for tap in level.blocks]
    modules = [tap.module for _, tap in blocks]
    for name in names:
        if name not in modules:
            raise UserError(f"the {role} has no block {name!r}{nearest(name, modules)} (blocks: {', '.join(modules)})")
    places = [modules.index(name) for name in names]
    if places != sorted(set(places)):
        raise UserError(f"the {role}'s taps must be named in the order of its depth: {', '.join(modules)}")
    stages = []
    for start, end in pairwise([-1, *places]):
        level, last = blocks[end]
        group = [tap for _, tap in blocks[start + 1 : end + 1] if (tap.height, tap.width) == (last.height, last.width)]
        stages.append(level if last == level.exit and len(group) == 1 else _stage(level, tuple(group)))
    return stages


def _stage(level: Level, blocks: tuple[Tap, ...], before: tuple[Tap, ...] = ()) -> Level:
    """A stage of consecutive blocks. The entry of a single block is the previous block, if that is as wide."""
    if len(blocks) == 1 and before and before[0].channels == blocks[0].channels:
        return replace(level, entry=before[0], exit=blocks[0], blocks=blocks, kind="stage-input")
    equal = [tap for tap in blocks if tap.channels == blocks[-1].channels]
    entry = equal[0] if len(equal) > 1 else blocks[0] if len(blocks) > 1 else None
    kind = "block" if len(equal) > 1 else "unequal" if len(blocks) > 1 else "single"
    return replace(level, entry=entry, exit=blocks[-1], blocks=blocks, kind=kind)


def _check_skip(skip: Sequence[int], levels: Sequence[Level]) -> None:
    known = sorted({2**level.level for level in levels})
    for reduction in skip:
        if reduction not in known:
            raise UserError(f"--skip-level {reduction}: neither network has it (levels: {', '.join(map(str, known))})")


def _name(teacher: Level, student: Level, index: int) -> str:
    return f"/{2**student.level}" if teacher.level == student.level else f"stage {index + 1}"


def _taps(levels: Iterable[Level]) -> list[Tap]:
    taps = [tap for level in levels for tap in (*(ends(level) or ()), level.exit)]
    return list(dict.fromkeys(taps))
