"""Turns a configuration into the pieces of a run, checked before training: data, networks, matching."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from timm.layers import use_reentrant_ckpt
from timm.utils import random_seed

from irgdistill.config import (
    AUTO,
    DEFAULT_METHOD,
    ENCODER_METHOD,
    STAGE_KINDS,
    Config,
    InputSpec,
    absolute_source,
    check_run,
)
from irgdistill.data import Splits, UnreadableImages, balanced_weights, open_splits, train_images
from irgdistill.errors import UserError
from irgdistill.matching import Plan, match
from irgdistill.models import LOCAL, Network, build_booster, build_student, build_teacher, resolve_student
from irgdistill.training.checks import NO_CLASSIFIER, check_classes, check_input_sizes, check_logging, difference
from irgdistill.training.teacher_cache import TeacherCache, describe_data, describe_teacher, describe_views


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The checked pieces of a run: configuration, data, networks, and how they match."""

    config: Config
    splits: Splits
    student: Network
    teacher: Network | None
    plan: Plan | None
    crop: InputSpec
    """The crop that both networks see: the larger height and the larger width of their inputs."""
    booster: Network | None = None
    """The untrained network that `rocket` trains with the student."""
    cache: TeacherCache | None = None
    """Answers in place of the teacher, which then has no weights."""
    class_weights: list[float] | None = None
    """Weights of the cross-entropy, by class index."""
    teacher_checksum: str | None = None
    """Checksum of the teacher's weights, cached or live."""
    embedding_widths: tuple[int, int] | None = None
    """Widths of the student's and the teacher's embeddings, if a term compares them."""
    method_note: str = ""
    """The method that `auto` chose, and why; empty if it was given."""
    start_note: str = ""
    """The origin of the student's weights, in words, and of the teacher's if its file holds several."""

    @property
    def classes(self) -> list[str]:
        """Class names of the student, in label order; none for a student without a classifier."""
        return self.splits.classes if self.student.num_classes else []

    @property
    def notes(self) -> list[str]:
        """Lines for the log: data, method, initial weights."""
        lines = (str(self.splits), *self.splits.notes, self.method_note, self.start_note)
        return [line for line in lines if line]


class SharedInputs:
    """Data and live teacher of runs that differ in method and seed alone: opened once, for every run."""

    def __init__(self) -> None:
        self._splits: Splits | None = None
        self._teacher: Network | None = None
        self._checksum: str | None = None

    def splits(self, config: Config) -> Splits:
        if self._splits is None:
            self._splits = open_splits(config.data)
        return self._splits

    def teacher(self, config: Config, fetch: bool) -> Network:
        """A copy, because a run folds the teacher's batch-norm and hooks its blocks."""
        if self._teacher is None:
            self._teacher = build_teacher(config, fetch)
        return replace(self._teacher, model=deepcopy(self._teacher.model))

    def checksum(self, teacher: Network) -> str:
        """The checksum of the weights of `teacher`, a copy of this one."""
        if self._checksum is None:
            self._checksum = str(describe_teacher(teacher)["weights"])
        return self._checksum


def prepare(config: Config, resuming: bool = False, fetch: bool = True, inputs: SharedInputs | None = None) -> Setup:
    """Build and check a run. Raises UserError for everything that can be refused before training.

    `resuming`: the saved state supplies the student, so its initial checkpoint is not read. `fetch=False`: use random
    weights instead of downloading pretrained ones. `inputs`: data and teacher that other runs use too.
    """
    config = resolved(config, resuming)
    check_run(config, resuming)
    cache = None if config.teacher.cache is None else TeacherCache(config.teacher.cache)
    if cache is not None:
        config = cache.with_cached_views(config)
    asked = config
    config, splits, teacher, method_note = open_data(asked, lambda: _teacher(asked, cache, fetch, inputs), inputs)
    if splits.default_fraction is not None:  # remembered, so that the run finds the same images again
        config = config.replaced({"data.val_fraction": splits.default_fraction})
    class_weights = weigh_classes(config, splits)
    check_logging(config, splits)
    if teacher is not None:
        check_classes(config, teacher, splits.classes)
    classes = splits.classes if config.data.labels or config.losses.comparing("logits") else []
    random_seed(config.seed)  # right before the student is made, so that every method starts from the same weights
    student, start_note = build_student(config.student, classes, not resuming, fetch)
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
    return Setup(
        config=config,
        splits=splits,
        student=student,
        teacher=teacher,
        plan=plan,
        crop=crop,
        booster=booster,
        cache=cache,
        class_weights=class_weights,
        embedding_widths=_embedding_widths(config, student, teacher),
        method_note=method_note,
        teacher_checksum=None if teacher is None else _checksum(teacher, cache, inputs),
        start_note="; ".join(filter(None, (start_note, "" if teacher is None else teacher.note))),
    )


def open_data(
    config: Config, teacher: Callable[[], Network | None], inputs: SharedInputs | None = None
) -> tuple[Config, Splits, Network | None, str]:
    """Open the images and build the teacher, which supplies the classes if there are no labels.

    The configuration has the method that `auto` stands for; the text says which and why, and is empty for a method that
    was given. Raises UserError.
    """
    if config.data.labels:
        splits, network = (open_splits(config.data) if inputs is None else inputs.splits(config)), teacher()
        problem = "" if network is None else difference(network, splits.classes)
        config, note = _choose_method(config, problem)
        return config, splits, network, note
    network = teacher()
    assert network is not None
    config, note = _choose_method(config, "" if network.num_classes else NO_CLASSIFIER)
    classes = (network.classes or network.num_classes) if config.losses.comparing("logits") else 0
    return config, open_splits(config.data, classes=classes), network, note


def _choose_method(config: Config, problem: str) -> tuple[Config, str]:
    """The configuration with the method that `auto` stands for; `problem`: why the teacher's logits do not fit."""
    if config.method != AUTO:
        return config, ""
    chosen = ENCODER_METHOD if problem else DEFAULT_METHOD
    why = f"{problem}, so no logits are compared" if problem else "the teacher has the data's classes"
    return config.with_method(chosen), f"method {chosen}: {why}"


def _embedding_widths(config: Config, student: Network, teacher: Network | None) -> tuple[int, int] | None:
    if teacher is None or not config.losses.comparing("embedding"):
        return None
    return student.embedding_width(), teacher.embedding_width()


def _teacher(config: Config, cache: TeacherCache | None, fetch: bool, inputs: SharedInputs | None) -> Network | None:
    """The teacher of the method, if any; with a cache, without its weights.

    A teacher given beside a cache must be the cached one: the weights are compared if given, else the architecture.
    """
    if not config.uses_teacher:
        return None
    if cache is None:
        return build_teacher(config, fetch) if inputs is None else inputs.teacher(config, fetch)
    if config.teacher.checkpoint is not None:
        cache.check_same("teacher", describe_teacher(build_teacher(config)))
    elif config.teacher.name not in (None, cache.manifest["name"]):
        cache.check_same("teacher", {"architecture": config.teacher.name.split(".")[0]})
    return cache.teacher()


def _checksum(teacher: Network, cache: TeacherCache | None, inputs: SharedInputs | None) -> str:
    """The checksum of the teacher's weights, cached or live."""
    if cache is not None:
        return str(cache.manifest["teacher"]["weights"])
    return str(describe_teacher(teacher)["weights"]) if inputs is None else inputs.checksum(teacher)


def _check_cache(cache: TeacherCache, config: Config, splits: Splits, student: Network, plan: Plan | None) -> None:
    """Raises UserError if the run asks for what is not in the cache."""
    if splits.streaming:
        raise UserError(f"{config.data.source} is a stream, which cannot have a teacher cache")
    if not splits.labelled:
        raise UserError(
            "--teacher-cache: validation images without labels need the live teacher, to measure agreement; "
            "put them into class folders, or leave out --teacher-cache"
        )
    crop, count, seed = cache.crop(student.input), cache.views["views"], cache.views["seed"]
    cache.check_same("views", describe_views(config, crop, count, seed))
    images = train_images(splits, config.data, config.augment, crop, seed, UnreadableImages(config.data.max_bad_images))
    cache.check_same("data", describe_data(images, splits, count))
    if config.uses_teacher:
        cache.check_terms(config, plan)


def weigh_classes(config: Config, splits: Splits) -> list[float] | None:
    """The class weights of `losses.ce.class_weights`. Raises UserError, also if `balanced` has no labels to count."""
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


def resolved(config: Config, resuming: bool = False) -> Config:
    """The configuration with absolute paths, and the student's settings from its checkpoint. Raises UserError."""
    student = config.student if resuming else resolve_student(config.student)
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


def on_backend(config: Config, backend: str | None) -> Config:
    """The configuration on the device that `--backend` needs: gloo runs on the CPU."""
    return config.replaced({"runtime.device": "cpu"}) if backend == "gloo" else config


def _absolute(name: str | None) -> str | None:
    """The name of a network; one in a folder with the folder's full path."""
    if name is None or not name.startswith(LOCAL):
        return name
    return LOCAL + str(Path(name.removeprefix(LOCAL)).resolve())
