"""The state of a run on disk: one file with a checksum and no pickle, beside the state before it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from timm.utils import random_seed
from torch import Tensor

from irgdistill.config import Config, changeable_on_resume, keys, read_yaml, validate_saved
from irgdistill.errors import UserError
from irgdistill.io import FORMAT, Evaluation, Number, Record, RunFolder, read_tensors, save_tensors
from irgdistill.runtime import World

if TYPE_CHECKING:
    from typing_extensions import Self


Tensors = dict[str, Tensor]


NonNegative = Annotated[int, Field(ge=0, lt=2**63)]


class RandomStates(Record):
    """States of random generators, as `random_states` gives them."""

    python: tuple[int, list[int], float | None]
    numpy: tuple[str, Tensor, int, int, float]
    torch: Tensor
    cuda: list[Tensor]


class ProcessState(Record):
    """What one process keeps for itself."""

    random: RandomStates
    bad_images: list[str] = Field(default_factory=list)
    sums: Tensors
    """Sums of the values of its steps since the last record, scalars."""
    statistics: list[Tensors]
    """Batch-norm statistics of each of its models."""


class SavedState(Record):
    """The state of a run: position, results so far, and the states of all that is trained."""

    config: dict[str, Any]
    data: dict[str, Any]
    """Numbers of images, and class names."""
    taught_by: str | list[str] | None
    """Checksum of the teacher's weights, or of those of several."""
    epoch: NonNegative
    batch: NonNegative
    update: NonNegative
    best: Evaluation
    last: Evaluation
    seconds: Annotated[float, Field(ge=0)]
    images_seen: NonNegative
    tried: dict[str, str | Number | None] | None = None
    """Record of the teacher's accuracy before training."""
    student: Tensors
    adapters: Tensors = Field(default_factory=dict)
    ema: Tensors | None = None
    optimizer: dict[str, Any] = Field(default_factory=dict)
    scaler: dict[str, Any] = Field(default_factory=dict)
    processes: Annotated[list[ProcessState], Field(min_length=1)]
    bad_images: list[str]
    metrics: dict[str, NonNegative]
    """End of metrics.jsonl."""

    @model_validator(mode="after")
    def _check_results(self) -> Self:
        if self.epoch and not (self.best and self.last):
            raise ValueError("best and last are empty after an epoch")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a state. Raises UserError if it is missing, damaged, of a newer version, or does not fit."""
        return cls.parse(load_state(path), path)

    @property
    def position(self) -> str:
        return position(self.epoch, self.batch)


def position(epoch: int, batch: int) -> str:
    """A position in words: the epoch under way and its batches done."""
    return f"epoch {epoch + 1}, batch {batch}"


# --- on disk ----------------------------------------------------------------------------------------------------------


def save_state(path: Path, state: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write a tree of dicts, lists, numbers, strings and tensors; keep an older file as `previous`. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, "", tensors)
    save_tensors(path, tensors, {"format": FORMAT, "state": packed}, previous)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises UserError if it is missing, damaged, or of a newer version."""
    tensors, metadata = read_tensors(path)
    if metadata is None or "state" not in metadata:
        raise UserError(f"{path} is not a state of irgdistill")
    try:
        state: dict[str, Any] = _unpack(metadata["state"], tensors)
    except (LookupError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path} is damaged: its state cannot be read") from None
    return state


def open_state(folder: RunFolder, previous: bool = False) -> tuple[SavedState, Config]:
    """Read the state to resume from, or the `previous` one, and the run's configuration.

    Raises UserError if either is missing, damaged or of another run; the message names the other state if it is whole.
    """
    config = None
    if folder.config.exists():
        try:
            config = validate_saved(read_yaml(folder.config), f"{folder.config}: ")
        except UserError as error:
            raise UserError(f"{error}; correct it, or delete it to use the configuration in the state") from None
    try:
        path = folder.previous_state if previous else folder.state
        state = SavedState.read(path)
        remembered = validate_saved(state.config, f"{path}: ")
        if config is not None:
            _check_same_run(config, remembered, folder)
    except UserError as error:
        raise UserError(f"{error}; {other_state(folder, previous)}") from None
    return state, config or remembered


def other_state(folder: RunFolder, previous: bool) -> str:
    """Advice if the newer, or the `previous`, state cannot be used."""
    try:
        state = SavedState.read(folder.state if previous else folder.previous_state)
    except UserError:
        return "there is no other state to resume from"
    if previous:
        return f"the newer state is whole ({state.position}): leave out --previous-state"
    return f"the state before it is whole ({state.position}): {folder.resume_command} --previous-state"


def _check_same_run(config: Config, remembered: Config, folder: RunFolder) -> None:
    wrong = changes(config, remembered)
    if wrong:
        raise UserError(
            f"{folder.config} is not what the state was trained with ({'; '.join(wrong)}): "
            "correct it, or delete it to use the configuration in the state"
        )


def changes(config: Config, remembered: Config) -> list[str]:
    """Settings that a run must keep and that differ between two of its configurations, in words.

    A setting that is left open is chosen when a run starts, so it differs from no value.
    """
    changeable = changeable_on_resume() | config.left_open | remembered.left_open
    return [
        f"{key} = {_at(config, key)}, was {_at(remembered, key)}"
        for key in keys()
        if key not in changeable and _at(config, key) != _at(remembered, key)
    ]


def _at(config: Any, path: str) -> Any:
    if path == "teachers":  # what a resumed run may change of them is left out
        movable = {key.removeprefix("teacher.") for key in changeable_on_resume() if key.startswith("teacher.")}
        return [spec.model_dump(mode="json", exclude=movable) for spec in config.teachers]
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _pack(item, f"{name}.{key}".lstrip("."), tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{name}.{i}".lstrip("."), tensors) for i, item in enumerate(value)]
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _unpack(item, tensors) for key, item in value["items"]}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value


# --- parts of a state -------------------------------------------------------------------------------------------------


def seed_process(seed: int, world: World) -> None:
    """Seed Python's and numpy's generators, which draw mixup, alike in all processes; torch's, for dropout, differ."""
    random_seed(seed)
    if not world.main:
        torch.manual_seed(seed + world.rank)


def mean_of(entries: list[Any]) -> Any:
    """The mean of trees of tensors that differ in values alone."""
    first = entries[0]
    if isinstance(first, Tensor):
        return torch.stack(entries).mean(0)
    if isinstance(first, dict):
        return {key: mean_of([entry[key] for entry in entries]) for key in first}
    return [mean_of(list(items)) for items in zip(*entries, strict=True)]


def random_states(device: torch.device) -> dict[str, Any]:
    """States of the random generators of Python, numpy, torch and this process's GPU.

    A look at the other GPUs would open a context on each, half a GiB for every process.
    """
    version, words, gauss = random.getstate()
    name, words_numpy, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(words_numpy, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def restore_random_states(states: RandomStates, device: torch.device) -> None:
    """Restore the states that `random_states` returned; a GPU whose state is not there keeps its new generator.

    Version 0.1 saved the states of all GPUs, by number.
    """
    version, words, gauss = states.python
    random.setstate((version, tuple(words), gauss))
    name, words_numpy, position, has_gauss, cached = states.numpy
    np.random.set_state((name, words_numpy.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states.torch)
    saved = states.cuda
    own = saved[(device.index or 0) if len(saved) > 1 else 0 :][:1]
    if own and device.type == "cuda":
        torch.cuda.set_rng_state(own[0], device)
