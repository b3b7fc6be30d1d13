"""What a run needs to go on: saved in one piece, checked when read, with the one before it kept. No pickle."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irgdistill.config import Config, RuntimeConfig, changeable_on_resume, keys, read_yaml, validate
from irgdistill.errors import UserError
from irgdistill.io import FORMAT, RunFolder, own_copies, read_tensors, save_tensors


class Saver:
    """Saves a run: weights that wait, then the state, so that a state never knows of weights that are not on disk.

    What fails is told once, kept, and tried again at the next save.
    """

    def __init__(self, folder: RunFolder, runtime: RuntimeConfig, warn: Callable[[str], None]) -> None:
        self.folder, self.runtime = folder, runtime
        self.saved = "nothing is saved"
        """What a run could go on from."""
        self.error: OSError | None = None
        """Why the last save failed."""
        self._warn = warn
        self._position: str | None = None
        self._waiting: dict[Path, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        self._tried = time.monotonic()

    def add(self, path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Weights to write at the next save, which must come before they change."""
        self._waiting[path] = weights, metadata

    def due(self, update: int) -> bool:
        """Whether `--save-every-steps` or `--save-every-minutes` asks for a save after this update."""
        steps, minutes = self.runtime.save_every_steps, self.runtime.save_every_minutes
        late = minutes > 0 and time.monotonic() - self._tried >= 60 * minutes
        return late or (steps > 0 and update % steps == 0)

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write what waits and the state; `error` says what went wrong, if anything did."""
        failed, self._tried = self.error is not None, time.monotonic()
        try:
            self.write_weights()
            self._write_state(state())
        except OSError as error:
            self.error = error
            self._waiting = {path: (own_copies(weights), about) for path, (weights, about) in self._waiting.items()}
            if not failed:
                self._warn(f"not saved ({reason(error)}); {self.saved}; training goes on and tries again")
        else:
            self.error = None
            if failed:
                self._warn(f"saved again: {self.saved}")

    def write_weights(self) -> None:
        """Write the weights that wait. Raises OSError."""
        for path in list(self._waiting):
            save_tensors(path, *self._waiting[path])
            del self._waiting[path]

    def has(self, state: Mapping[str, Any]) -> None:
        """Take note that this state is on disk."""
        self._position = position(state)
        self.saved = f"the last saved state is {self._position}"

    def _write_state(self, state: dict[str, Any]) -> None:
        if position(state) != self._position:  # otherwise nothing was trained since
            save_state(self.folder.state, state, self.folder.previous_state)
            self.has(state)


def reason(error: OSError) -> str:
    """Of a failed write, in words."""
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")


def position(state: Mapping[str, Any]) -> str:
    """Where a state stands, in words; its epoch is the one under way."""
    return f"epoch {state['epoch'] + 1}, batch {state['batch']}"


# --- on disk ----------------------------------------------------------------------------------------------------------


def save_state(path: Path, state: Mapping[str, Any], previous: Path | None = None) -> None:
    """Any tree of dicts, lists, numbers, strings and tensors. What was at `path` goes to `previous`. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, "", tensors)
    save_tensors(path, tensors, {"format": FORMAT, "state": packed}, previous)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote. Raises UserError when it is missing, damaged, or of a newer version."""
    tensors, metadata = read_tensors(path)
    if metadata is None or "state" not in metadata:
        raise UserError(f"{path} is not a state of irgdistill")
    state: dict[str, Any] = _unpack(metadata["state"], tensors)
    return state


def open_state(folder: RunFolder, previous: bool = False) -> tuple[dict[str, Any], Config]:
    """The state to go on from, or the one before it, and the run's configuration.

    Raises UserError when one is missing, damaged or of another run than the other; the line names the other state
    where that one is good.
    """
    config = None
    if folder.config.exists():
        try:
            config = validate(read_yaml(folder.config), f"{folder.config}: ")
        except UserError as error:
            raise UserError(f"{error}; put it right, or delete it to take what the state remembers") from None
    try:
        state = load_state(folder.previous_state if previous else folder.state)
        remembered = validate(state["config"])
        if config is not None:
            _check_same(config, remembered, folder)
    except UserError as error:
        raise UserError(f"{error}; {other_state(folder, previous)}") from None
    return state, config or remembered


def other_state(folder: RunFolder, previous: bool) -> str:
    """What to do when the newer or the `previous` state cannot be used."""
    try:
        state = load_state(folder.state if previous else folder.previous_state)
    except UserError:
        return "there is no other state to go on from"
    if previous:
        return f"the newer state is whole ({position(state)}): leave out --previous-state"
    return f"the state before it is whole ({position(state)}): {folder.resume_command} --previous-state"


def _check_same(config: Config, remembered: Config, folder: RunFolder) -> None:
    wrong = changes(config, remembered)
    if wrong:
        raise UserError(
            f"{folder.config} is not what the state was trained with ({'; '.join(wrong)}): "
            "put it right, or delete it to take what the state remembers"
        )


def changes(config: Config, remembered: Config) -> list[str]:
    """What differs of what must not between two configurations of one run, in words."""
    changeable = changeable_on_resume()
    return [
        f"{key} = {_at(config, key)}, was {_at(remembered, key)}"
        for key in keys()
        if key not in changeable and _at(config, key) != _at(remembered, key)
    ]


def _at(config: Any, path: str) -> Any:
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


def best_on_disk(path: Path, remembered: dict[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """Metrics of the best weights there are: those of the file at `path`, {} when it is missing or damaged.

    The file may be newer than the state (stopped between the two, or resumed from the previous state): its weights
    did reach their metrics, so they count. `remembered`: what the state says of it.
    """
    if not remembered and not path.exists():
        return {}
    try:
        found: dict[str, Any] = (read_tensors(path)[1] or {}).get("metrics", {})
    except UserError as error:
        if remembered:
            warn(f"{error}; {score(remembered)} of epoch {remembered['epoch']} is lost with it")
        return {}
    if remembered and found.get(metric(remembered), 0) < remembered[metric(remembered)]:
        warn(f"{path} is not the best of the run, {score(remembered)} of epoch {remembered['epoch']}")
    return found


def metric(metrics: Mapping[str, Any]) -> str:
    """What chooses the best weights: accuracy, or without labelled images agreement with the teacher."""
    return "top1" if "top1" in metrics else "agreement"


def score(metrics: Mapping[str, Any]) -> str:
    """The same with its value, in words."""
    name = metric(metrics)
    return f"{'top-1' if name == 'top1' else name} {metrics[name]:.2f}"


def mean_of(entries: list[Any]) -> Any:
    """Trees of tensors, alike but for their values -> their mean."""
    first = entries[0]
    if isinstance(first, Tensor):
        return torch.stack(entries).mean(0)
    if isinstance(first, dict):
        return {key: mean_of([entry[key] for entry in entries]) for key in first}
    return [mean_of(list(items)) for items in zip(*entries, strict=True)]


def random_states() -> dict[str, Any]:
    """Of Python, numpy, torch and every CUDA device."""
    version, words, gauss = random.getstate()
    name, words_numpy, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(words_numpy, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, words_numpy, *rest = states["numpy"]
    np.random.set_state((name, words_numpy.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
