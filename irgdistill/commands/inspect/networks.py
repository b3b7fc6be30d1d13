"""Opens what `inspect-graph` compares: networks from a run, a checkpoint or a name, their plan, and the images."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from timm.utils import random_seed

from irgdistill.commands.inspect.measures import draw_evenly
from irgdistill.commands.requests import ADVICE, InspectRequest
from irgdistill.config import (
    Config,
    DataConfig,
    MatchingConfig,
    architecture_of,
    data_of,
    public_name,
    split_function,
    validate,
)
from irgdistill.data import Source, Splits, Unlabelled, open_splits
from irgdistill.errors import UserError
from irgdistill.io import Report, find_checkpoint, visible
from irgdistill.matching import Plan, match, print_plan
from irgdistill.models import CheckpointMetadata, Network, build_network, build_teacher, put_in_order, restore
from irgdistill.training import check_input_sizes


@dataclass(frozen=True)
class NetworkUnderTest:
    """One network of an inspection."""

    label: str
    network: Network
    weights: str
    """Where its weights come from."""


@dataclass(frozen=True)
class Inspection:
    """Networks to compare on the same images."""

    teacher: NetworkUnderTest
    students: list[NetworkUnderTest]
    plan: Plan
    splits: Splits
    """`val_indices` are the drawn images, sorted by class."""
    data: DataConfig

    @property
    def networks(self) -> list[NetworkUnderTest]:
        """The teacher, then the students."""
        return [self.teacher, *self.students]


def known_networks(request: InspectRequest) -> Config:
    """The configuration, completed with the teacher and matching that a run or checkpoint records.

    Reads no weights. Raises UserError: two students, a teacher that is not the run's, no teacher.
    """
    config = request.config
    if request.target is not None:
        config = _complete(request.target, request, config)
    if config.teacher.name is None and config.teacher.checkpoint is None:
        raise UserError(
            f"{request.target} does not record its teacher, or had none: "
            "give --teacher NAME or --teacher-checkpoint FILE"
        )
    if config.teachers:
        Report().line(f"the teacher is the first of {len(config.all_teachers)}")
    return config


def _complete(target: str, request: InspectRequest, config: Config) -> Config:
    given = [
        flag
        for flag, value in (
            ("--student", config.student.name),
            ("--student-checkpoint", request.student_checkpoint),
            ("--student-pretrained", request.student_pretrained),
        )
        if value
    ]
    if given:
        raise UserError(f"{target} is the student: leave out {' and '.join(given)} (another one: --compare)")
    path = _checkpoint(target)
    metadata = _own_metadata(path)
    recorded = _recorded_config(path, metadata)
    own, architecture = recorded.teacher, None if metadata.teacher is None else metadata.teacher.architecture
    given_teacher = config.teacher
    fetched = own.name is not None and ":" in own.name and split_function(own.name) is None
    if fetched and given_teacher.name is None and given_teacher.checkpoint is None:
        raise UserError(f"{path} names its teacher {own.name}, which a file cannot have looked up: give --teacher")
    if given_teacher.checkpoint is not None and given_teacher.checkpoint.exists():
        theirs = CheckpointMetadata.read(_checkpoint(str(given_teacher.checkpoint)))
        if theirs is not None:
            _check_teacher(target, metadata, theirs.architecture)
    asked = given_teacher.name
    if asked is not None and (":" not in asked or split_function(asked)):  # hf-hub:… is known after the download
        _check_teacher(target, metadata, architecture_of(asked))
    return config.replaced(
        {
            "student.name": metadata.name,
            "student.args": metadata.args_without_size,
            "student.input_size": config.student.input_size or metadata.input_size,
            "matching": recorded.matching if config.matching == MatchingConfig() else config.matching,
            "teacher": own,
            "teachers": config.teachers or recorded.teachers,
            "teacher.name": given_teacher.name
            or own.name
            or (architecture if given_teacher.checkpoint is None else None),
            "teacher.checkpoint": given_teacher.checkpoint
            or (None if given_teacher.name is not None and architecture is None else own.checkpoint),
            "teacher.input_size": given_teacher.input_size or own.input_size,
            "teacher.preprocessing": own.preprocessing.replaced(given_teacher.preprocessing.given),
        }
    )


def _check_teacher(target: str, metadata: CheckpointMetadata, architecture: str) -> None:
    own = architecture if metadata.teacher is None else metadata.teacher.architecture
    if own != architecture:
        raise UserError(f"{target} was taught by a {own}, not by a {architecture}: give another --teacher, or none")


def _recorded_config(path: Path, metadata: CheckpointMetadata) -> Config:
    """Teacher and matching of the run that wrote a checkpoint."""
    teacher = metadata.teacher
    keys = {"name", "checkpoint", "input_size", "preprocessing"}
    recorded = {} if teacher is None else teacher.model_dump(include=keys)
    others = [other.model_dump(include={"name", "checkpoint"}) for other in metadata.teachers]
    return validate({"teacher": recorded, "teachers": others, "matching": metadata.matching}, f"{path}: ")


def show_plan(request: InspectRequest) -> None:
    """Print the matched stages, from shapes alone: no data, no weights. Raises UserError."""
    config = known_networks(request)
    names = [
        _name(config.teacher.name, config.teacher.checkpoint, "--teacher"),
        _name(config.student.name, request.student_checkpoint, "--student"),
    ]
    teacher = build_network(names[0], meta=True, input_size=config.teacher.input_size)
    student = build_network(names[1], meta=True, input_size=config.student.input_size, args=config.student.args)
    plan = _plan(teacher, student, config)
    if request.as_json:
        sizes = {"teacher_input_size": teacher.input.size, "student_input_size": student.input.size}
        print(json.dumps({"teacher": teacher.name, "student": student.name, **sizes, **plan.to_dict()}, indent=1))  # noqa: T201
    else:
        print_plan(plan, stdout=True)


def _name(name: str | None, checkpoint: Path | None, flag: str) -> str:
    """A network's name, or the one that its checkpoint records."""
    if name is None:
        name = _own_metadata(_checkpoint(str(checkpoint)), flag).name
    return name


def open_networks(request: InspectRequest, config: Config) -> Inspection:
    """Build and check everything before the first image is read; `config` is that of `known_networks`.

    Raises UserError for everything that can be refused.
    """
    path = None if request.target is None else _checkpoint(request.target)
    metadata = None if path is None else _own_metadata(path)
    data, classes = config.data, None
    if metadata is not None:
        data = data_of(str(request.target), metadata.data, config.data, request.given, metadata.plugins)
        classes = metadata.classes
    splits, teacher = _draw_images(data, request, config.seed, classes), _teacher(config, request)
    if splits.labelled and (note := put_in_order(teacher, splits.classes)):
        Report().line(note)
    student, label, weights = _student(config, request, path, len(splits.classes))
    students = [NetworkUnderTest(label, student, weights)]
    if metadata is not None:
        _check_teacher(str(request.target), metadata, teacher.architecture)
    plan = _plan(teacher, student, config)
    if metadata is not None and config.matching == MatchingConfig():
        _check_plan(str(request.target), metadata, plan)
    if request.compare is not None:
        students.append(_other(request.compare, students[0], teacher, plan, config))
    for tested in students:
        if splits.labelled and tested.network.classes is not None and tested.network.classes != splits.classes:
            raise UserError(f"the class names of {data.source} are not those that {tested.label} was trained on")
    checkpoint = config.teacher.checkpoint
    own = "pretrained" if teacher.code is None else "as its function returns it"
    return Inspection(
        NetworkUnderTest(teacher.architecture, teacher, own if checkpoint is None else str(checkpoint)),
        students,
        plan,
        splits,
        data,
    )


def _teacher(config: Config, request: InspectRequest) -> Network:
    checkpoint = config.teacher.checkpoint
    if checkpoint is not None and not checkpoint.exists():
        whose = "" if request.target is None else f" of {request.target}"
        raise UserError(f"the teacher{whose} is not at {checkpoint}; give its file with --teacher-checkpoint")
    return build_teacher(config.teacher)


def _student(config: Config, request: InspectRequest, path: Path | None, classes: int) -> tuple[Network, str, str]:
    """The student, its label, and where its weights come from."""
    name, size, given = config.student.name, config.student.input_size, config.student.preprocessing.given
    checkpoint = path
    if request.student_checkpoint is not None:
        checkpoint = _checkpoint(str(request.student_checkpoint))
    if checkpoint is not None:
        network = restore(checkpoint, name, size, preprocessing=given)[0]
        return network, _label(request.target or str(request.student_checkpoint)), str(checkpoint)
    assert name is not None
    if request.student_pretrained:
        network = build_network(name, pretrained=True, input_size=size, preprocessing=given)
        return network, f"{public_name(name)} pretrained", "pretrained"
    random_seed(config.seed)  # the same weights as a run with this seed starts from
    args = config.student.args
    network = build_network(name, num_classes=classes, input_size=size, args=args, preprocessing=given)
    return network, f"{public_name(name)} untrained", f"untrained, seed {config.seed}"


def _other(target: str, first: NetworkUnderTest, teacher: Network, plan: Plan, config: Config) -> NetworkUnderTest:
    """The network of --compare. Raises UserError if it has another architecture or other matched stages."""
    path = _checkpoint(target)
    metadata = _own_metadata(path)
    own = first.network.architecture
    if metadata.architecture != own:
        raise UserError(f"--compare {target} holds a {metadata.architecture}, {first.label} is a {own}")
    network = restore(path, None, config.student.input_size)[0]
    if _student_taps(_plan(teacher, network, config)) != _student_taps(plan):
        raise UserError(f"--compare {target}: its stages are not those of {first.label}")
    _check_plan(f"--compare {target}", metadata, plan)
    label = _label(target)
    return NetworkUnderTest(
        label if label != first.label else f"{_run_label(path.parent)}/{path.stem}", network, str(path)
    )


def _check_plan(what: str, metadata: CheckpointMetadata, plan: Plan) -> None:
    """Raises UserError if a run was trained at other stages of the student than those of `plan`."""
    if metadata.plan and metadata.plan.student_taps() != _student_taps(plan):
        stages = ", ".join(metadata.plan.student_taps())
        raise UserError(
            f"{what} was trained at other stages, {stages}, not at {', '.join(_student_taps(plan))}: "
            "give the --levels, --skip-level or --taps-student it was trained with"
        )


def _student_taps(plan: Plan) -> list[str]:
    return [pair.student.exit.module for pair in plan.pairs]


def _plan(teacher: Network, student: Network, config: Config) -> Plan:
    plan = match(teacher.levels(), student.levels(), config.matching)
    check_input_sizes(teacher, student, plan)
    return plan


def _draw_images(data: DataConfig, request: InspectRequest, seed: int, classes: list[str] | None) -> Splits:
    """Draw images of every class, or any images if they have no labels."""
    splits = open_splits(data, val_only=request.split == "val", classes=classes)
    if splits.streaming:
        raise UserError(f"{data.source} is a stream, and inspect-graph needs images by index")
    source, indices = splits.val, splits.val_indices
    if request.split == "train":
        source, indices = splits.train, splits.labelled_train_indices()
    if not (splits.labelled if request.split == "val" else data.labels):
        source, splits = Unlabelled(source, 0), replace(splits, classes=["unlabelled"], labelled=False)
    labels = source.labels()
    chosen = draw_evenly([labels[i] for i in indices], request.images, seed)
    return replace(splits, val=source, val_indices=[indices[i] for i in chosen])


def image_name(source: Source, index: int, data: DataConfig) -> str:
    """Name of an image, relative to its data folder if there is one."""
    name = source.describe(index)
    root = Path(data.source or "")
    return str(Path(name).relative_to(root)) if root.is_dir() and Path(name).is_relative_to(root) else name


def _checkpoint(target: str) -> Path:
    path = find_checkpoint(target)
    if path is None:
        raise UserError(f"no run folder or checkpoint {target!r}; {ADVICE}")
    return path


def _own_metadata(path: Path, flag: str = "") -> CheckpointMetadata:
    metadata = CheckpointMetadata.read(path)
    if metadata is None:
        if not path.is_file():
            raise UserError(f"no file {path}")
        remedy = f"name the architecture too, with {flag} NAME" if flag else "give --student NAME --student-checkpoint"
        raise UserError(f"{path} was not written by irgdistill and does not name its network; {remedy}")
    return metadata


def _label(target: str) -> str:
    """Name of a run folder, or of a file without its suffix; the weights of a run after the name of its folder."""
    path = Path(target).resolve()
    if path.is_dir():
        return _run_label(path)
    return f"{_run_label(path.parent)}/{path.stem}" if path.stem in ("best", "last") else visible(path.stem)


def _run_label(folder: Path) -> str:
    """Name of a run folder; of a run of `compare` METHOD/SEED, because the folder's name is only its seed."""
    return visible(f"{folder.parent.name}/{folder.name}" if folder.name.isdecimal() else folder.name)
