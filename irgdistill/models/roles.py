"""Builds the networks of a run by their roles: teacher, student and booster, each with its initial weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irgdistill.config import Config, StudentConfig, TeacherConfig, import_function, split_function
from irgdistill.errors import UserError
from irgdistill.io import Report, RunFolder, find_checkpoint
from irgdistill.models.build import build_network
from irgdistill.models.checkpoint import CheckpointMetadata, read_checkpoint, restore
from irgdistill.models.foreign import Role
from irgdistill.models.network import Network
from irgdistill.models.weights import Weights, classifier_keys, load_weights


def build_teacher(spec: TeacherConfig, fetch: bool = True) -> Network:
    """Build a teacher from its name, its checkpoint or both. Without `fetch`, pretrained weights stay random.

    Raises UserError as `build_network` and `restore` do.
    """
    if spec.checkpoint is not None:
        path = find_checkpoint(str(spec.checkpoint)) or spec.checkpoint
        teacher = restore(path, spec.name, spec.input_size, "teacher", spec.preprocessing.given)[0]
    else:
        assert spec.name is not None
        given = spec.preprocessing.given
        teacher = build_network(spec.name, pretrained=fetch, input_size=spec.input_size, preprocessing=given)
        teacher.foreign = teacher.code is not None
    teacher.pooling = spec.pooling
    return teacher


def build_booster(config: Config, num_classes: int) -> Network:
    """Build the network that `rocket` trains beside the student: the teacher's architecture with random weights.

    Raises UserError as `build_teacher` does, and for a network that a function makes, whose weights it decides.
    """
    spec = config.teacher
    if split_function(spec.name) is not None:
        raise UserError(f"rocket trains the teacher's architecture from random weights: {spec.name} is none of timm's")
    if spec.checkpoint is None and spec.name is not None:
        given = spec.preprocessing.given
        return build_network(spec.name, num_classes=num_classes, input_size=spec.input_size, preprocessing=given)
    known = build_teacher(spec)
    return build_network(
        known.name,
        num_classes=num_classes,
        input_size=known.input.size,
        args=known.args,
        preprocessing=known.input.preprocessing,
    )


def resolve_student(spec: StudentConfig) -> StudentConfig:
    """Copy `spec` with the network that its checkpoint records, so that a run resumes without that file.

    Raises UserError: a name of another architecture, weights without a name, an unreadable file.
    """
    if spec.checkpoint is None:
        return spec
    checkpoint = spec.checkpoint.resolve()
    spec = spec.replaced({"pretrained": False, "checkpoint": checkpoint})
    path, option = _checkpoint_file(checkpoint), "--student (train: --model)"
    metadata = CheckpointMetadata.read(path)
    if metadata is None:
        if spec.name is None:
            raise UserError(f"{path} was not written by irgdistill and does not name its network; give {option} too")
        return spec
    metadata.check_name(path, spec.name, option)
    return spec.replaced(
        {
            "name": spec.name if spec.name is not None and metadata.code is not None else metadata.name,
            "args": {**metadata.args_without_size, **spec.args},
            "input_size": spec.input_size or metadata.input_size,
            "preprocessing": spec.preprocessing.replaced({**metadata.preprocessing, **spec.preprocessing.given}),
        }
    )


def build_student(
    spec: StudentConfig, classes: list[str], weights: bool = True, fetch: bool = True
) -> tuple[Network, str]:
    """Build the student of a resolved `spec` with a classifier for `classes`; the second value says where it starts.

    `weights=False`: random weights, for a run that resumes and loads its own. `fetch=False`: random weights instead of
    downloading. Raises UserError: unknown name, weights that are missing or do not fit, no classifier.
    """
    assert spec.name is not None
    if spec.pretrained and split_function(spec.name) is not None:
        raise UserError(f"{spec.name} decides its weights itself: leave out --student-pretrained (train: --pretrained)")
    pretrained = spec.pretrained and weights and fetch
    student = build_network(
        spec.name,
        pretrained=pretrained,
        num_classes=len(classes),
        input_size=spec.input_size,
        args=spec.args,
        preprocessing=spec.preprocessing.given,
    )
    if student.num_classes != len(classes):  # without classes, the student returns its embedding
        if student.code is not None:
            raise UserError(
                f"{student.name} returns {student.num_classes} logits, and the data have {len(classes)} classes: "
                "let the function take num_classes"
            )
        raise UserError(f"{student.name} has no classifier to train on {len(classes)} classes")
    note = "" if student.code is None or not weights else f"{student.name} starts as its function returns it"
    if spec.checkpoint is not None and weights:
        note = _load_initial(student, _checkpoint_file(spec.checkpoint), classes)
    elif pretrained:
        own = int(student.cfg.get("num_classes") or 0)
        note = f"{student.name} starts from its pretrained weights" + _classifier_note(own, classes)
    return student, note


def _checkpoint_file(path: Path) -> Path:
    return find_checkpoint(str(path)) or path


def _load_initial(student: Network, path: Path, classes: list[str]) -> str:
    """Load a checkpoint, but for a classifier that does not fit, and say where the student starts."""
    own, head = student.model.state_dict(), classifier_keys(student.model)
    read, metadata = read_checkpoint(path, "student", student.name, student.args)
    weights = read.tensors
    if read.args:
        needed = json.dumps({**student.args, **read.args})
        raise UserError(f"the weights in {path} need other arguments of timm's network: --set 'student.args={needed}'")
    theirs = metadata.classes if metadata is not None else classes
    count = next((len(weights[key]) for key in head if key in weights), 0)
    same_width = all(weights[key].shape[1:] == own[key].shape[1:] for key in head if key in weights)
    if head and same_width and (count != len(classes) or theirs != classes):
        weights = {**weights, **{key: own[key] for key in head}}
    load_weights(student.model, Weights(weights, str(path)), student.name)
    note = f"{student.name} starts from {path}" + (f" ({read.note})" if read.note else "")
    if head and count == len(classes) and theirs != classes:
        return f"{note}; its classifier is new, for other classes"
    return note + (_classifier_note(count, classes) if head else "")


def _classifier_note(count: int, classes: list[str]) -> str:
    if count == len(classes):
        return ""
    return f"; its classifier is new, for {len(classes)} classes instead of {count or 'none'}"


def open_network(
    target: str,
    checkpoint: Path | None,
    size: tuple[int, int] | None,
    role: Role = "student",
    preprocessing: Mapping[str, Any] | None = None,
) -> tuple[Network, CheckpointMetadata | None]:
    """Open what the user named: a checkpoint, a run folder, a timm name (pretrained, or with the weights of
    `checkpoint`), or FILE.py:FUNCTION.

    `preprocessing` replaces what is given of the network's own.
    The second value is the checkpoint's metadata, None for weights that irgdistill did not write. Raises UserError.
    """
    if split_function(target) is not None:
        target, _ = import_function(target)
    path = find_checkpoint(target)
    if path is not None:
        if checkpoint is not None:
            raise UserError(f"{target} is a checkpoint itself; leave out {checkpoint}")
        if Path(target).is_dir() and path == RunFolder(Path(target)).last:
            Report().warn(f"{target} holds no best.safetensors; using last.safetensors")
        return restore(path, None, size, role, preprocessing)
    if checkpoint is not None:
        network, metadata = restore(checkpoint, target, size, role, preprocessing)
        if network.note:
            Report().line(network.note)
        return network, metadata
    return build_network(target, pretrained=True, input_size=size, preprocessing=preprocessing), None
