"""Checks on incompatible settings, networks and data, made before training."""

from __future__ import annotations

from collections.abc import Sequence

from irgdistill.config import ENCODER_METHOD, Config
from irgdistill.data import Splits
from irgdistill.errors import UserError
from irgdistill.io import LOGGERS, check_loggers
from irgdistill.matching import Level, Plan
from irgdistill.models import Network


def check_logging(config: Config, splits: Splits) -> None:
    """Raises UserError for a logger that is not installed, and for graph images that cannot be drawn or logged."""
    check_loggers(config.runtime.loggers)
    if not config.runtime.graph_images_every:
        return
    asked = f"runtime.graph_images_every = {config.runtime.graph_images_every}"
    if not config.runtime.loggers:
        raise UserError(f"{asked}: no logger receives the images; give --log {' or --log '.join(LOGGERS)}")
    if not config.uses_teacher:
        raise UserError(f"{asked}: method {config.method!r} has no teacher whose graphs could be drawn")
    if config.teacher.cache is not None:
        raise UserError(f"{asked}: --teacher-cache trains without the teacher that draws its graphs; leave one out")
    if splits.streaming:
        raise UserError(f"{asked}: {config.data.source} is a stream, which has no images to draw from")


def difference(teacher: Network, classes: list[str], name: str = "the teacher") -> str:
    """Why the teacher's output is no logits over these classes, in words; empty if it is. `name`: what to call it."""
    if not teacher.num_classes:
        return f"{name} has no classifier"
    if teacher.num_classes != len(classes):
        return f"{name} has {teacher.num_classes:,} classes and the data {len(classes):,}"
    if teacher.classes is not None and teacher.classes != classes:
        first = next(i for i, (a, b) in enumerate(zip(teacher.classes, classes, strict=True)) if a != b)
        return f"class {first} is {teacher.classes[first]!r} for {name} and {classes[first]!r} in the data"
    return ""


def called(teachers: Sequence[Network], number: int) -> str:
    """What to call one of the teachers in a message."""
    return "the teacher" if len(teachers) == 1 else f"teacher {number + 1}, {teachers[number].name},"


def check_classes(config: Config, teachers: Sequence[Network], classes: list[str]) -> None:
    """Terms on logits need a teacher with the same classes in the same order; relation terms need none.

    Raises UserError.
    """
    used = config.losses.comparing("logits")
    problems = [difference(teacher, classes, called(teachers, i)) for i, teacher in enumerate(teachers)]
    problem = " and ".join(problems)
    if used and all(problems):
        unset = " ".join(f"--set losses.{name}.weight=0" for name in used)
        several = len(used) > 1
        first = "" if not config.data.labels else "train a teacher of these classes with `irgdistill train`, or "
        raise UserError(
            f"{problem}, but the term{'s' * several} {' and '.join(used)} compare{'s' * (not several)} logits: {first}"
            f"use --method {ENCODER_METHOD}, whose terms need no shared classes ({unset} leaves these out)"
        )


def check_input_sizes(teacher: Network, student: Network, plan: Plan) -> None:
    """Raises UserError, with the smallest input size that works, if a matched map shrinks to one pixel."""
    for role, network in (("teacher", teacher), ("student", student)):
        for pair in plan.pairs:
            level: Level = getattr(pair, role)
            step = 2**level.level
            if min(network.input.size) > 2 * step:
                continue
            found = network.map_size(level.exit, network.input.size)
            if found is not None and min(found) > 1:
                continue
            sizes = [step + 1, *range(step + step // 4, 5 * step + 1, max(step // 4, 1))]
            maps = ((size, network.map_size(level.exit, (size, size))) for size in sorted(set(sizes)))
            smallest = next((size for size, found in maps if found is not None and min(found) > 1), 2 * step)
            option = "--input-size" if role == "student" else "--teacher-input-size"
            raise UserError(
                f"at {'×'.join(map(str, network.input.size))} the /{step} map of {network.name} shrinks to a point; "
                f"the smallest size that works is {option} {smallest}"
            )


def check_processes(config: Config, splits: Splits, count: int) -> None:
    """Raises UserError, with the nearest size that works, if the processes cannot share a batch evenly."""
    size, unit = config.data.batch_size, count * (2 if config.augment.mixup or config.augment.cutmix else 1)
    if count > 1 and splits.streaming:
        raise UserError(f"{config.data.source} is a stream, which one process reads: leave out --gpus")
    if size % unit:
        near = sorted({max(size // unit, 1) * unit, (size // unit + 1) * unit})
        pairs = " in pairs, which mixup needs" if unit > count else ""
        raise UserError(
            f"--batch-size {size} is the batch of all {count} processes and cannot be shared evenly{pairs}: "
            f"the nearest that can is {' or '.join(map(str, near))}"
        )
