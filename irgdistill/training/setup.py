"""From a configuration to everything a run needs, checked before anything is trained: data, networks, plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from timm.layers import use_reentrant_ckpt
from timm.utils import random_seed

from irgdistill.config import STAGE_KINDS, Config, InputSpec, absolute_source, check_run
from irgdistill.data import Splits, UnreadableImages, balanced_weights, open_splits, train_images
from irgdistill.errors import UserError
from irgdistill.matching import Plan, match
from irgdistill.models import LOCAL, Network, build_booster, build_student, build_teacher, resolve_student
from irgdistill.training.checks import check_classes, check_input_sizes, check_logging
from irgdistill.training.teacher_cache import Cache, describe_data, describe_teacher, describe_views


@dataclass
class Setup:
    """What a run works with."""

    config: Config
    splits: Splits
    student: Network
    teacher: Network | None
    plan: Plan | None
    crop: InputSpec
    """The crop that both networks see: the larger height and the larger width of their inputs."""
    booster: Network | None = None
    """The untrained network that `rocket` trains beside the student."""
    cache: Cache | None = None
    """What answers in the teacher's place, which then has no weights."""
    class_weights: list[float] | None = None
    """Of the cross-entropy, in label order."""
    taught_by: str | None = None
    """Checksum of the teacher's weights, cached or live."""
    start: str = ""
    """Where the student's weights come from, in words; empty for random ones."""

    @property
    def classes(self) -> list[str]:
        return self.splits.classes


def prepare(config: Config, begun: bool = False, fetch: bool = True) -> Setup:
    """Build and check. Raises UserError for everything that can be refused before training.

    A run that has `begun` brings the student's weights itself: those it started from are not read again. Without
    `fetch`, pretrained weights are not downloaded: random ones stand for them.
    """
    config = resolved(config, begun)
    check_run(config, begun)
    cache = None if config.teacher.cache is None else Cache(config.teacher.cache)
    if cache is not None:
        config = cache.adopt(config)
    splits, teacher = open_data(config, lambda: _teacher(config, cache, fetch))
    class_weights = weigh_classes(config, splits)
    check_logging(config, splits)
    if teacher is not None:
        check_classes(config, teacher, splits.classes)
    random_seed(config.seed)  # right before the student is made, so that every method starts from the same weights
    student, start = build_student(config.student, splits.classes, not begun, fetch)
    if config.student.grad_checkpointing:
        _checkpoint_blocks(student)
    plan = None
    if teacher is not None and config.losses.comparing(*STAGE_KINDS):
        plan = match(teacher.levels(), student.levels(), config.matching)
        check_input_sizes(teacher, student, plan)
    booster = build_booster(config, len(splits.classes)) if config.losses.comparing("booster") else None
    crop = student.input.covering(*(network.input for network in (teacher, booster) if network is not None))
    if cache is not None:
        crop = cache.crop(student.input)
        _check_cache(cache, config, splits, student, plan)
    taught_by = None
    if teacher is not None:
        about = describe_teacher(teacher) if cache is None else cache.about["teacher"]
        taught_by = str(about["weights"])
    return Setup(config, splits, student, teacher, plan, crop, booster, cache, class_weights, taught_by, start)


def open_data(config: Config, teacher: Callable[[], Network | None]) -> tuple[Splits, Network | None]:
    """The images, and the teacher that is built; without labels their classes are the teacher's. Raises UserError."""
    if config.data.labels:
        return open_splits(config.data), teacher()
    network = teacher()
    assert network is not None
    return open_splits(config.data, classes=network.classes or network.num_classes), network


def _teacher(config: Config, cache: Cache | None, fetch: bool) -> Network | None:
    """The teacher, where there is one; without its weights, where a cache answers in its place.

    A teacher that is given too must be the one that answered: its weights where they are given, else its architecture.
    """
    if cache is None or not config.uses_teacher:
        return build_teacher(config, fetch) if config.uses_teacher else None
    if config.teacher.checkpoint is not None:
        cache.check_same("teacher", describe_teacher(build_teacher(config)))
    elif config.teacher.name not in (None, cache.about["name"]):
        cache.check_same("teacher", {"architecture": config.teacher.name.split(".")[0]})
    return cache.teacher()


def _check_cache(cache: Cache, config: Config, splits: Splits, student: Network, plan: Plan | None) -> None:
    """Raises UserError where the run is not on what was cached."""
    if splits.streaming:
        raise UserError(f"{config.data.source} is a stream, which no teacher cache can be of")
    if not splits.labelled:
        raise UserError(
            "--teacher-cache: validation images without labels are judged by agreement with the live teacher; "
            "put them into class folders, or leave out --teacher-cache"
        )
    crop, count, seed = cache.crop(student.input), cache.views["views"], cache.views["seed"]
    cache.check_same("views", describe_views(config.augment, crop, count, seed))
    images = train_images(splits, config.data, config.augment, crop, seed, UnreadableImages(config.data.max_bad_images))
    cache.check_same("data", describe_data(images, splits, count))
    if config.uses_teacher:
        cache.check_terms(config.losses, plan)


def weigh_classes(config: Config, splits: Splits) -> list[float] | None:
    """The weights of `losses.ce.class_weights`. Raises UserError, also where `balanced` has no labels to count."""
    asked = config.losses.ce.class_weights
    for flag, on in (("--balanced", config.data.balanced), ("losses.ce.class_weights", asked == "balanced")):
        if on and splits.streaming:
            raise UserError(f"{flag}: {config.data.source} is a stream, whose classes cannot be counted beforehand")
    if asked == "balanced":
        return balanced_weights(splits.train_labels(), splits.classes)
    if asked == "none":
        return None
    if len(asked) != len(splits.classes) or not any(asked):
        raise UserError(
            f"losses.ce.class_weights holds {len(asked)} weights, the data {len(splits.classes)} classes: "
            "give one for each class, not all 0"
        )
    return list(asked)


def _checkpoint_blocks(student: Network) -> None:
    if use_reentrant_ckpt():
        raise UserError("reentrant checkpointing gives the taps no gradient: unset TIMM_REENTRANT_CKPT")
    try:
        student.model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise UserError(f"{student.name} does not support student.grad_checkpointing") from None


def resolved(config: Config, begun: bool = False) -> Config:
    """The same run, whatever folder it is continued or evaluated from. Raises UserError as `resolve_student` does."""
    student = config.student if begun else resolve_student(config.student)
    data, teacher = config.data, config.teacher
    source = data.source and absolute_source(data.source)
    return config.replaced(
        {
            "student": student.replaced({"name": _absolute(student.name)}),
            "data": data.replaced({"source": source, "root": data.root.resolve()}),
            "teacher": teacher.replaced(
                {
                    "name": _absolute(teacher.name),
                    "checkpoint": teacher.checkpoint and teacher.checkpoint.resolve(),
                    "cache": teacher.cache and teacher.cache.resolve(),
                }
            ),
        }
    )


def _absolute(name: str | None) -> str | None:
    """The name of a network; one in a folder with the folder's full path."""
    if name is None or not name.startswith(LOCAL):
        return name
    return LOCAL + str(Path(name.removeprefix(LOCAL)).resolve())
