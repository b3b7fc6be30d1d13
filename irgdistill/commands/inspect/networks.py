"""Who meets whom in `inspect-graph`: networks from a run, a checkpoint or by name, their plan, the images they see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.utils import random_seed

from irgdistill.commands.inspect.measures import draw_evenly
from irgdistill.commands.requests import ADVICE, InspectRequest
from irgdistill.config import Config, DataConfig, MatchingConfig, data_of, validate
from irgdistill.data import Source, Splits, Unlabelled, open_splits
from irgdistill.errors import UserError
from irgdistill.io import find_checkpoint
from irgdistill.matching import Plan, match, print_plan
from irgdistill.models import Network, build_network, build_teacher, described, restore
from irgdistill.training import check_input_sizes


@dataclass(frozen=True)
class Member:
    """One network of the inspection."""

    label: str
    network: Network
    weights: str
    """Where its weights come from."""


@dataclass(frozen=True)
class Meeting:
    """Networks that see the same images."""

    teacher: Member
    students: list[Member]
    plan: Plan
    splits: Splits
    """`val_indices` are the images that were drawn, sorted by class."""
    data: DataConfig


def known_networks(request: InspectRequest) -> Config:
    """The configuration with what a run or checkpoint remembers beneath what was asked for now: teacher, matching.

    Reads no weights. Raises UserError: two students, a teacher that is not the run's, none at all.
    """
    config = request.config
    if request.target is not None:
        config = _remember(request.target, request, config)
    if config.teacher.name is None and config.teacher.checkpoint is None:
        raise UserError(
            f"{request.target} does not say where its teacher is, or had none: "
            "give --teacher NAME or --teacher-checkpoint FILE"
        )
    return config


def _remember(target: str, request: InspectRequest, config: Config) -> Config:
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
    remembered = _run_of(path, metadata)
    own, name = remembered.teacher, (metadata["teacher"] or {}).get("architecture")
    asked = config.teacher
    if asked.checkpoint is not None and asked.checkpoint.exists():
        theirs = described(_checkpoint(str(asked.checkpoint)))
        if theirs is not None:
            _check_taught(target, metadata, theirs["architecture"])
    if asked.name is not None and ":" not in asked.name:  # what hf-hub:… holds is known once it is there
        _check_taught(target, metadata, asked.name.split(".")[0])
    return config.replaced(
        {
            "student.name": metadata["architecture"],
            "student.args": {key: value for key, value in metadata["args"].items() if key != "img_size"},
            "student.input_size": config.student.input_size or tuple(metadata["input_size"]),
            "matching": remembered.matching if config.matching == MatchingConfig() else config.matching,
            "teacher": own,
            "teacher.name": asked.name or own.name or (name if asked.checkpoint is None else None),
            "teacher.checkpoint": asked.checkpoint
            or (None if asked.name is not None and name is None else own.checkpoint),
            "teacher.input_size": asked.input_size or own.input_size,
        }
    )


def _check_taught(target: str, metadata: Mapping[str, Any], teacher: str) -> None:
    own = (metadata["teacher"] or {}).get("architecture", teacher)
    if own != teacher:
        raise UserError(f"{target} was taught by a {own}, not by a {teacher}: give another --teacher, or none")


def _run_of(path: Path, metadata: Mapping[str, Any]) -> Config:
    """Teacher and matching of the run that wrote a checkpoint."""
    teacher = metadata["teacher"] or {}
    keys = ("name", "checkpoint", "input_size")
    tree = {"teacher": {key: teacher.get(key) for key in keys}, "matching": metadata["matching"]}
    return validate(tree, f"{path}: ")


def show_plan(request: InspectRequest) -> None:
    """Print which stages meet, from shapes alone: no data, no weights. Raises UserError."""
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
    """A network's name, or the one that its checkpoint tells."""
    if name is None:
        name = _own_metadata(_checkpoint(str(checkpoint)), flag)["architecture"]
    return name


def meet(request: InspectRequest, config: Config) -> Meeting:
    """Build and check everything before the first image is read; `config` is that of `known_networks`.

    Raises UserError for all that can be refused.
    """
    path = None if request.target is None else _checkpoint(request.target)
    metadata = {} if path is None else _own_metadata(path)
    data = data_of(str(request.target), metadata, config.data, request.given) if metadata else config.data
    splits, teacher = _drawn(data, request, config.seed, metadata.get("classes")), _teacher(config, request)
    student, label, weights = _student(config, request, path, len(splits.classes))
    students = [Member(label, student, weights)]
    if metadata:
        _check_taught(str(request.target), metadata, teacher.architecture)
    plan = _plan(teacher, student, config)
    if metadata and config.matching == MatchingConfig():
        _check_plan(str(request.target), metadata, plan)
    if request.compare is not None:
        students.append(_other(request.compare, students[0], teacher, plan, config))
    for member in students:
        if splits.labelled and member.network.classes is not None and member.network.classes != splits.classes:
            raise UserError(f"the class names of {data.source} are not those that {member.label} was trained on")
    checkpoint = config.teacher.checkpoint
    return Meeting(
        Member(teacher.architecture, teacher, "pretrained" if checkpoint is None else str(checkpoint)),
        students,
        plan,
        splits,
        data,
    )


def _teacher(config: Config, request: InspectRequest) -> Network:
    checkpoint = config.teacher.checkpoint
    if checkpoint is not None and not checkpoint.exists():
        whose = "" if request.target is None else f" of {request.target}"
        raise UserError(f"the teacher{whose} is not at {checkpoint}; say where it is with --teacher-checkpoint")
    return build_teacher(config)


def _student(config: Config, request: InspectRequest, path: Path | None, classes: int) -> tuple[Network, str, str]:
    """The student, what to call it, and where its weights come from."""
    name, size = config.student.name, config.student.input_size
    checkpoint = path
    if request.student_checkpoint is not None:
        checkpoint = _checkpoint(str(request.student_checkpoint))
    if checkpoint is not None:
        network = restore(checkpoint, name, size)[0]
        return network, _label(request.target or str(request.student_checkpoint)), str(checkpoint)
    assert name is not None
    if request.student_pretrained:
        return build_network(name, pretrained=True, input_size=size), f"{name} pretrained", "pretrained"
    random_seed(config.seed)  # as a run with this seed begins
    network = build_network(name, num_classes=classes, input_size=size, args=config.student.args)
    return network, f"{name} untrained", f"untrained, seed {config.seed}"


def _other(target: str, first: Member, teacher: Network, plan: Plan, config: Config) -> Member:
    """The network of --compare. Raises UserError where it is another network or was matched otherwise."""
    path = _checkpoint(target)
    metadata = _own_metadata(path)
    own = first.network.architecture
    if metadata["architecture"] != own:
        raise UserError(f"--compare {target} holds a {metadata['architecture']}, {first.label} is a {own}")
    network = restore(path, None, config.student.input_size)[0]
    if _student_taps(_plan(teacher, network, config).to_dict()) != _student_taps(plan.to_dict()):
        raise UserError(f"--compare {target}: its stages are not those of {first.label}")
    _check_plan(f"--compare {target}", metadata, plan)
    label = _label(target)
    return Member(label if label != first.label else f"{path.parent.name}/{path.stem}", network, str(path))


def _check_plan(what: str, metadata: Mapping[str, Any], plan: Plan) -> None:
    """Raises UserError when a run learned at other stages of the student than `plan` has."""
    if metadata.get("plan") and _student_taps(metadata["plan"]) != _student_taps(plan.to_dict()):
        stages = ", ".join(_student_taps(metadata["plan"]))
        raise UserError(
            f"{what} was matched otherwise, at {stages}, not at {', '.join(_student_taps(plan.to_dict()))}: "
            "give the --levels, --skip-level or --taps-student it was trained with"
        )


def _student_taps(plan: Mapping[str, Any]) -> list[str]:
    return [pair["student"]["exit"]["module"] for pair in json.loads(json.dumps(plan))["pairs"]]


def _plan(teacher: Network, student: Network, config: Config) -> Plan:
    plan = match(teacher.levels(), student.levels(), config.matching)
    check_input_sizes(teacher, student, plan)
    return plan


def _drawn(data: DataConfig, request: InspectRequest, seed: int, classes: list[str] | None) -> Splits:
    """Images of every class; of images without labels any, as if they were of one class."""
    splits = open_splits(data, val_only=request.split == "val", classes=classes)
    if splits.streaming:
        raise UserError(f"{data.source} is a stream: inspect-graph draws images of every class and needs them by index")
    source, indices = splits.val, splits.val_indices
    if request.split == "train":
        source, indices = splits.train, splits.train_indices
    if not (splits.labelled if request.split == "val" else data.labels):
        source, splits = Unlabelled(source, 0), replace(splits, classes=["unlabelled"], labelled=False)
    labels = source.labels()
    chosen = draw_evenly([labels[i] for i in indices], request.images, seed)
    return replace(splits, val=source, val_indices=[indices[i] for i in chosen])


def image_name(source: Source, index: int, data: DataConfig) -> str:
    """Name of an image, within its data folder where there is one."""
    name = source.describe(index)
    root = Path(data.source or "")
    return str(Path(name).relative_to(root)) if root.is_dir() and Path(name).is_relative_to(root) else name


def _checkpoint(target: str) -> Path:
    path = find_checkpoint(target)
    if path is None:
        raise UserError(f"no run folder or checkpoint {target!r}; {ADVICE}")
    return path


def _own_metadata(path: Path, flag: str = "") -> dict[str, Any]:
    metadata = described(path)
    if metadata is None:
        if not path.is_file():
            raise UserError(f"no file {path}")
        remedy = f"name the architecture too, with {flag} NAME" if flag else "give --student NAME --student-checkpoint"
        raise UserError(f"{path} was not written by irgdistill and does not name its network; {remedy}")
    return {"teacher": None, **metadata}


def _label(target: str) -> str:
    """A run folder's name, a file's name without its ending; those of a run folder with its name."""
    path = Path(target).resolve()
    if path.is_dir():
        return path.name
    return f"{path.parent.name}/{path.stem}" if path.stem in ("best", "last") else path.stem
