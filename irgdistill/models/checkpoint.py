"""Checkpoints that describe themselves: safetensors with everything that rebuilds the network. No pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from irgdistill.config import Pixels, PluginConfig, Pooling, architecture_of
from irgdistill.errors import UserError
from irgdistill.io import FORMAT, Evaluation, Record, read_metadata, read_tensors
from irgdistill.models.build import build_network, rebuild_network
from irgdistill.models.conversion import find_in_file
from irgdistill.models.foreign import Role
from irgdistill.models.network import Network, NetworkRecord
from irgdistill.models.weights import Weights

if TYPE_CHECKING:
    from typing_extensions import Self


class TeacherRecord(Record):
    """The teacher of the run that wrote a checkpoint."""

    architecture: str
    name: str
    """timm name, with its source and weight tag."""
    weights: str
    """Checksum of its weights."""
    checkpoint: str | None = None
    """File of its weights; None: pretrained."""
    input_size: tuple[Pixels, Pixels] | None = None
    """Height and width that the run asked for."""
    pooling: Pooling = "auto"
    """How its embedding is made."""
    weight: float = 1.0
    """Its share beside other teachers."""
    preprocessing: Mapping[str, Any] = Field(default_factory=dict)
    """Mean, std, interpolation and crop_pct that the run asked for."""


class TermRecord(Record):
    """A term of the loss that a run was trained with."""

    weight: float
    fade: tuple[float, float] | None = None


class TapRecord(Record):
    """A block of a network, and the width of its output."""

    module: str
    channels: int


class LevelRecord(Record):
    """A stage of a network, by its last block."""

    exit: TapRecord


class PairRecord(Record):
    """A stage of the teacher, and that of the student which learns from it."""

    name: str
    teacher: LevelRecord
    student: LevelRecord


class PlanRecord(Record):
    """The matched stages: what is read of the values of `Plan.to_dict`."""

    pairs: tuple[PairRecord, ...]
    notes: tuple[str, ...] = ()

    def student_taps(self) -> list[str]:
        """The student's last block of each stage."""
        return [pair.student.exit.module for pair in self.pairs]


class CheckpointMetadata(NetworkRecord):
    """The network of a checkpoint and the run that wrote it.

    The fields of the run have defaults: a checkpoint may describe a network alone. Unknown fields are ignored.
    """

    format: int
    classes: list[str]
    """Class names in label order."""
    metrics: Evaluation = Field(default_factory=dict)
    """Result of the last evaluation of these weights."""
    method: str = ""
    losses: Mapping[str, TermRecord] = Field(default_factory=dict)
    """Term -> its settings."""
    seed: int = 0
    teacher: TeacherRecord | None = None
    teachers: tuple[TeacherRecord, ...] = ()
    """The further teachers of a run with several."""
    matching: Mapping[str, Any] = Field(default_factory=dict)
    """Settings of the section `matching`."""
    plan: PlanRecord | None = None
    """The matched stages."""
    data: Mapping[str, Any] | None = None
    """Settings of the section `data`."""
    plugins: tuple[PluginConfig, ...] = ()
    """Plug-ins of the run, one of which may provide its data source."""
    versions: Mapping[str, str] = Field(default_factory=dict)

    @property
    def file(self) -> Path | None:
        known = (plugin.path for plugin in self.plugins if self.code and plugin.sha256 == self.code.sha256)
        return next(known, super().file)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The metadata of a checkpoint; None for weights that irgdistill did not write.

        Raises UserError: unreadable, the state of a run, or a field that does not fit.
        """
        values = read_metadata(path) if path.suffix == ".safetensors" else None
        return None if values is None else cls.parse(values, path)

    @classmethod
    def parse(cls, values: object, path: Path, what: str = "metadata") -> Self:
        """Validate the metadata read from `path`. Raises UserError as `read` does."""
        if isinstance(values, Mapping) and "state" in values:
            raise UserError(f"{path} is the state of a run; its weights are in best.safetensors and last.safetensors")
        return super().parse(values, path, what)

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if len(self.classes) != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, and there are {len(self.classes)} classes")
        return self

    def check_name(self, path: Path, name: str | None, option: str) -> None:
        """Raises UserError if `name`, given with `option`, is another architecture."""
        if name is not None and architecture_of(name) != self.architecture:
            raise UserError(f"{path} holds a {self.architecture}, not a {name}; leave {option} out")


def describe(network: Network, classes: list[str]) -> dict[str, Any]:
    """The part of a checkpoint's metadata that rebuilds and feeds its network."""
    return {"format": FORMAT, **network.describe(), "classes": classes}


def timm_config(network: Network, classes: list[str]) -> dict[str, Any]:
    """config.json of a timm `local-dir:`, for a network of timm."""
    cfg, kept = network.cfg, ("first_conv", "classifier", "fixed_input_size", "pool_size")
    keep = {key: cfg[key] for key in kept if cfg.get(key)}
    return {
        "architecture": network.architecture,
        "num_classes": network.num_classes,
        "num_features": network.model.num_features,
        "label_names": classes,
        "model_args": network.args,
        "pretrained_cfg": {**keep, "input_size": list(network.input.shape), **network.input.preprocessing},
    }


def read_checkpoint(
    path: Path, role: Role, name: str | None, args: Mapping[str, Any] | None = None
) -> tuple[Weights, CheckpointMetadata | None]:
    """Weights and metadata (None for other files, in which the weights of timm's `name` with `args` are found).

    Raises UserError as `CheckpointMetadata.read` and `find_in_file`, if damaged, or without a name that is needed.
    """
    if CheckpointMetadata.read(path) is None:
        if name is None:
            raise UserError(
                f"{path} was not written by irgdistill and does not name its network; name the architecture too"
            )
        return find_in_file(path, name, role, args or {}), None
    tensors, values = read_tensors(path)
    assert values is not None
    return Weights(tensors, str(path)), CheckpointMetadata.parse(values, path)


def restore(
    path: Path,
    name: str | None = None,
    input_size: tuple[int, int] | None = None,
    role: Role = "student",
    preprocessing: Mapping[str, Any] | None = None,
) -> tuple[Network, CheckpointMetadata | None]:
    """Rebuild a network from a checkpoint, and its metadata; from any other file of weights given its `name`.

    Of a file with a teacher and a student, `role` says which; `preprocessing` replaces what is given of the network's
    own. Raises UserError: unreadable, truncated or damaged file,
    other weights without a name, weights that do not fit, another name than the checkpoint's own.
    """
    weights, metadata = read_checkpoint(path, role, name)
    if metadata is None:
        assert name is not None
        network = build_network(
            name, weights=weights, input_size=input_size, args=weights.args, preprocessing=preprocessing
        )
        network.foreign = True
        network.note = f"{network.name}: {weights.note} in {path}" if weights.note else ""
        return network, None
    metadata.check_name(path, name, "the name")
    network = rebuild_network(metadata, input_size=input_size, weights=weights, preprocessing=preprocessing)
    network.classes = metadata.classes
    return network, metadata
