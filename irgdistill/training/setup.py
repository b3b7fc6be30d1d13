"""Turns a configuration into the pieces of a run, checked before training: data, networks, matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from timm.layers import use_reentrant_ckpt
from timm.utils import random_seed

from irgdistill.config import (
    AUTO,
    DEFAULT_METHOD,
    ENCODER_METHOD,
    STAGE_KINDS,
    Config,
    InputSpec,
    architecture_of,
    check_partly_labelled,
    check_run,
)
from irgdistill.data import Splits, UnreadableImages, balanced_weights, open_splits, train_images
from irgdistill.errors import UserError
from irgdistill.matching import Plan, match
from irgdistill.models import Network, build_booster, build_student, build_teacher, put_in_order
from irgdistill.training.cached_views import with_cached_views
from irgdistill.training.checks import called, check_classes, check_input_sizes, check_logging, difference
from irgdistill.training.recipe import with_recipe
from irgdistill.training.resolving import resolved
from irgdistill.training.teacher_cache import TeacherCache, describe_data, describe_teacher, describe_views


@dataclass(frozen=True, kw_only=True)
class TeacherSetup:
    """A teacher of a run, and how it matches the student."""

    network: Network
    weight: float
    """Its share beside the other teachers."""
    answers: bool
    """Its classes are the data's, so that its logits can be compared."""
    checksum: str
    """Checksum of its weights, cached or live."""
    plan: Plan | None = None
    """The matched stages, if a term compares any."""
    cache: TeacherCache | None = None
    """Answers in place of the network, which then has no weights."""
    embedding_widths: tuple[int, int] | None = None
    """Widths of the student's and the teacher's embeddings, if a term compares them."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The checked pieces of a run: configuration, data, networks, and how they match."""

    config: Config
    splits: Splits
    student: Network
    teachers: Sequence[TeacherSetup]
    """None for a method without a teacher. The properties below are those of the first."""
    crop: InputSpec
    """The crop that all networks see: the largest height and the largest width of their inputs."""
    booster: Network | None = None
    """The untrained network that `rocket` trains with the student."""
    class_weights: list[float] | None = None
    """Weights of the cross-entropy, by class index."""
    teacher_notes: Sequence[str] = ()
    """Teachers whose classes were put in order, and the method that `auto` chose, in words."""
    recipe_note: str = ""
    """The optimizer and learning rate that were chosen; empty if they were given."""
    start_note: str = ""
    """The origin of the student's weights, in words, and of the teacher's if its file holds several."""

    @property
    def teacher(self) -> Network | None:
        return self.teachers[0].network if self.teachers else None

    @property
    def plan(self) -> Plan | None:
        return self.teachers[0].plan if self.teachers else None

    @property
    def embedding_widths(self) -> tuple[int, int] | None:
        return self.teachers[0].embedding_widths if self.teachers else None

    @property
    def checksums(self) -> str | list[str] | None:
        """Of the weights of the teacher, or of each of several; None without one."""
        found = [teacher.checksum for teacher in self.teachers]
        return found if len(found) > 1 else next(iter(found), None)

    @property
    def plans(self) -> list[Plan | None]:
        """The matched stages of each teacher; one without any if there is no teacher."""
        return [teacher.plan for teacher in self.teachers] or [None]

    @property
    def caches(self) -> list[TeacherCache]:
        return [teacher.cache for teacher in self.teachers if teacher.cache is not None]

    @property
    def classes(self) -> list[str]:
        """Class names of the student, in label order; none for a student without a classifier."""
        return self.splits.classes if self.student.num_classes else []

    @property
    def notes(self) -> list[str]:
        """Lines for the log: data, teachers, method, initial weights, recipe."""
        lines = (str(self.splits), *self.splits.notes, *self.teacher_notes, self.start_note, self.recipe_note)
        return [line for line in lines if line]


class SharedInputs:
    """Data and live teachers of runs that differ in method and seed alone: opened once, for every run."""

    def __init__(self) -> None:
        self._splits: Splits | None = None
        self._teachers: dict[int, Network] = {}
        self._checksums: dict[int, str] = {}

    def splits(self, config: Config) -> Splits:
        if self._splits is None:
            self._splits = open_splits(config.data)
        return self._splits

    def teacher(self, config: Config, number: int, fetch: bool) -> Network:
        """A copy, because a run folds the teacher's batch-norm and hooks its blocks."""
        if number not in self._teachers:
            self._teachers[number] = build_teacher(config.all_teachers[number], fetch)
        own = self._teachers[number]
        return replace(own, model=deepcopy(own.model))

    def checksum(self, teacher: Network, number: int) -> str:
        """The checksum of the weights of `teacher`, a copy of this one."""
        if number not in self._checksums:
            self._checksums[number] = str(describe_teacher(teacher)["weights"])
        return self._checksums[number]


def prepare(config: Config, resuming: bool = False, fetch: bool = True, inputs: SharedInputs | None = None) -> Setup:
    """Build and check a run. Raises UserError for everything that can be refused before training.

    `resuming`: the saved state supplies the student, so its initial checkpoint is not read. `fetch=False`: use random
    weights instead of downloading pretrained ones. `inputs`: data and teacher that other runs use too.
    """
    config = resolved(config, resuming)
    check_run(config, resuming)
    caches = [None if spec.cache is None else TeacherCache(spec.cache) for spec in config.all_teachers]
    config = with_cached_views(config, caches)
    asked = config
    config, splits, teachers, teacher_notes = open_data(asked, lambda: _teachers(asked, caches, fetch, inputs), inputs)
    if splits.default_fraction is not None:  # remembered, so that the run finds the same images again
        config = config.replaced({"data.val_fraction": splits.default_fraction})
    class_weights = weigh_classes(config, splits)
    check_logging(config, splits)
    if teachers:
        check_classes(config, teachers, splits.classes)
    classes = splits.classes if config.data.labels or config.losses.comparing("logits") else []
    random_seed(config.seed)  # right before the student is made, so that every method starts from the same weights
    student, start_note = build_student(config.student, classes, not resuming, fetch)
    config, recipe_note = with_recipe(config, student.model)
    if config.student.grad_checkpointing:
        _checkpoint_blocks(student)
    matched = [
        _matched(config, number, teacher, student, splits.classes, caches[number], inputs)
        for number, teacher in enumerate(teachers)
    ]
    booster = build_booster(config, len(splits.classes)) if config.losses.comparing("booster") else None
    crop = student.input.covering(*(network.input for network in (*teachers, booster) if network is not None))
    if used := [cache for cache in caches if cache is not None]:
        crop = used[0].crop(student.input)
        _check_caches(used, config, splits, student)
    for spec, teacher in zip(config.all_teachers, matched, strict=False):
        if teacher.cache is not None:
            teacher.cache.check_terms(config.losses, teacher.plan, spec, teacher.answers)
    return Setup(
        config=config,
        splits=splits,
        student=student,
        teachers=matched,
        crop=crop,
        booster=booster,
        class_weights=class_weights,
        teacher_notes=teacher_notes,
        recipe_note=recipe_note,
        start_note="; ".join(filter(None, (start_note, *(teacher.note for teacher in teachers)))),
    )


def open_data(
    config: Config, teachers: Callable[[], list[Network]], inputs: SharedInputs | None = None
) -> tuple[Config, Splits, list[Network], list[str]]:
    """Open the images and build the teachers, the first of which supplies the classes if there are no labels.

    Teachers that name all classes give their logits in the data's order. The configuration has the method that `auto`
    stands for; the texts say what was put in order, and which method was chosen and why. Raises UserError.
    """
    if config.data.labels:
        splits, networks = (open_splits(config.data) if inputs is None else inputs.splits(config)), teachers()
        config, notes = _in_order(config, networks, splits.classes)
        if splits.labelled_count is not None and config.data.labelled_fraction is None:
            check_partly_labelled(config, f"{config.data.source} has training images without a label")
        return config, splits, networks, notes
    networks = teachers()
    first = networks[0]
    known = first.classes or [str(number) for number in range(first.num_classes)]
    config, notes = _in_order(config, networks, known)
    classes = (first.classes or first.num_classes) if config.losses.comparing("logits") else 0
    return config, open_splits(config.data, classes=classes), networks, notes


def _in_order(config: Config, teachers: Sequence[Network], classes: list[str]) -> tuple[Config, list[str]]:
    """Put the live teachers' classes in order, and choose the method that `auto` stands for."""
    pairs = zip(config.all_teachers, teachers, strict=False)
    notes = [put_in_order(teacher, classes) for spec, teacher in pairs if spec.cache is None]
    config, note = _choose_method(config, teachers, classes)
    return config, [text for text in (*notes, note) if text]


def _choose_method(config: Config, teachers: Sequence[Network], classes: list[str]) -> tuple[Config, str]:
    """The configuration with the method that `auto` stands for: the default if all teachers have these classes."""
    if config.method != AUTO:
        return config, ""
    problems = (difference(teacher, classes, called(teachers, number)) for number, teacher in enumerate(teachers))
    problem = next(filter(None, problems), "")
    chosen = ENCODER_METHOD if problem else DEFAULT_METHOD
    have = "the teacher has" if len(teachers) == 1 else "the teachers have"
    why = f"{problem}, so no logits are compared" if problem else f"{have} the data's classes"
    return config.with_method(chosen), f"method {chosen}: {why}"


def _teachers(
    config: Config, caches: Sequence[TeacherCache | None], fetch: bool, inputs: SharedInputs | None
) -> list[Network]:
    """The teachers of the method, if it has any; with a cache, without its weights.

    A teacher given beside a cache must be the cached one: the weights are compared if given, else the architecture, and
    any preprocessing.
    """
    networks: list[Network] = []
    for number, (spec, cache) in enumerate(zip(config.all_teachers, caches, strict=True)):
        if not config.uses_teacher:
            break
        if cache is None:
            live = build_teacher(spec, fetch) if inputs is None else inputs.teacher(config, number, fetch)
            networks.append(live)
            continue
        if spec.checkpoint is not None:
            live = build_teacher(spec)
            put_in_order(live, cache.manifest.classes or [])
            cache.check_same("teacher", describe_teacher(live))
        elif spec.name not in (None, cache.manifest.name):
            cache.check_same("teacher", {"architecture": architecture_of(spec.name)})
        cache.check_same("teacher", spec.preprocessing.model_dump(mode="json", exclude_none=True))
        networks.append(cache.teacher())
    return networks


def _matched(
    config: Config,
    number: int,
    teacher: Network,
    student: Network,
    classes: list[str],
    cache: TeacherCache | None,
    inputs: SharedInputs | None,
) -> TeacherSetup:
    """A teacher matched with the student. Raises UserError if they cannot be."""
    plan = None
    if config.losses.comparing(*STAGE_KINDS):
        plan = match(teacher.levels(), student.levels(), config.matching)
        check_input_sizes(teacher, student, plan)
    if cache is not None:
        checksum = cache.manifest.teacher.weights
    else:
        checksum = str(describe_teacher(teacher)["weights"]) if inputs is None else inputs.checksum(teacher, number)
    embeds = config.losses.comparing("embedding")
    return TeacherSetup(
        network=teacher,
        weight=config.all_teachers[number].weight,
        answers=not difference(teacher, classes),
        checksum=checksum,
        plan=plan,
        cache=cache,
        embedding_widths=(student.embedding_width(), teacher.embedding_width()) if embeds else None,
    )


def _check_caches(caches: Sequence[TeacherCache], config: Config, splits: Splits, student: Network) -> None:
    """Raises UserError if the caches hold other images or views than the run's."""
    if splits.streaming:
        raise UserError(f"{config.data.source} is a stream, which cannot have a teacher cache")
    if not splits.labelled and config.teacher.cache is not None:
        raise UserError(
            "--teacher-cache: validation images without labels need the live teacher, to measure agreement; "
            "put them into class folders, or leave out --teacher-cache"
        )
    first = caches[0]
    crop, count, seed = first.crop(student.input), first.views.views, first.views.seed
    first.check_same("views", describe_views(config, crop, count, seed))
    images = train_images(splits, config.data, config.augment, crop, seed, UnreadableImages(config.data.max_bad_images))
    data = describe_data(images, splits, count)
    for cache in caches:
        cache.check_same("data", data)


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
