"""The run folder: weights that describe themselves, the state to go on from, atomic writes. No pickle.

best.safetensors  last.safetensors   student weights; everything needed to use them is in the metadata
config.json                          makes the folder a timm `local-dir:`
config.yaml  metrics.jsonl  summary.json
state/state.safetensors              optimizer, EMA, position, random states
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from irgdistill.errors import UserError
from irgdistill.models import Network, build_network
from irgdistill.models.build import read_weights

FORMAT = 1
KEY = "irgdistill"


class RunFolder:
    """Paths of one run, and what may be done with a folder that is already there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.safetensors"
        self.last = path / "last.safetensors"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.timm_config = path / "config.json"
        self.state = path / "state" / "state.safetensors"

    def _own(self) -> list[Path]:
        return [self.best, self.last, self.config, self.metrics, self.summary, self.timm_config, self.state]

    def check(self, overwrite: bool) -> list[Path]:
        """Files to be replaced. Raises UserError where another run, or something that is no run, would be lost."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file")
        found = [path for path in self._own() if path.exists()]
        if found and not overwrite:
            kind = "a finished run" if self.summary.exists() else "an unfinished run"
            go_on = "" if self.summary.exists() else f", --resume {self.path} to go on with it,"
            raise UserError(f"{self.path} holds {kind}; give another --output{go_on} or --overwrite to replace it")
        return found

    def create(self, overwrite: bool) -> None:
        """Make an empty run folder. Raises UserError as `check` does."""
        for path in self.check(overwrite):
            path.unlink()
        self.state.parent.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file, which then takes the place of `path` in one step and survives a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Tensors as safetensors, `metadata` as JSON in the header."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": "pt", KEY: json.dumps(dict(metadata))}
    write_atomically(path, lambda temporary: save_file(own, temporary, metadata=header))


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What a checkpoint of ours says about itself; None for other safetensors. Raises UserError when unreadable."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file: {error}") from None
    if KEY not in header:
        return None
    metadata: dict[str, Any] = json.loads(header[KEY])
    if metadata.get("format", 0) > FORMAT:
        raise UserError(
            f"{path} was written by a newer irgdistill (format {metadata['format']}, this one reads {FORMAT})"
        )
    return metadata


def find_checkpoint(target: str) -> Path | None:
    """A checkpoint file, or the best one of a run folder; None when `target` is neither."""
    path = Path(target)
    if path.is_dir():
        for candidate in (RunFolder(path).best, RunFolder(path).last):
            if candidate.exists():
                return candidate
        raise UserError(f"{path} holds no best.safetensors or last.safetensors")
    if path.is_file() or path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        return path
    return None


# --- networks ---------------------------------------------------------------------------------------------------------


def describe(network: Network, classes: list[str]) -> dict[str, Any]:
    """The part of a checkpoint's metadata that rebuilds and feeds its network."""
    return {
        "format": FORMAT,
        "architecture": network.architecture,
        "args": network.args,
        "num_classes": network.num_classes,
        "classes": classes,
        "input_size": list(network.size),
        "mean": list(network.mean),
        "std": list(network.std),
        "interpolation": network.interpolation,
        "crop_pct": network.crop_pct,
    }


def timm_config(network: Network, classes: list[str]) -> dict[str, Any]:
    """config.json of a timm `local-dir:`."""
    cfg: Any = network.model.pretrained_cfg
    keep = {key: cfg[key] for key in ("first_conv", "classifier", "fixed_input_size", "pool_size") if cfg.get(key)}
    return {
        "architecture": network.architecture,
        "num_classes": network.num_classes,
        "num_features": network.model.num_features,
        "label_names": classes,
        "model_args": network.args,
        "pretrained_cfg": {
            **keep,
            "input_size": [len(network.mean), *network.size],
            "mean": list(network.mean),
            "std": list(network.std),
            "interpolation": network.interpolation,
            "crop_pct": network.crop_pct,
        },
    }


def restore(
    path: Path, name: str | None = None, input_size: tuple[int, int] | None = None
) -> tuple[Network, dict[str, Any]]:
    """A network from a checkpoint: ours by itself, any other one given its `name`. Second value: metadata, or {}.

    Raises UserError: unreadable or truncated file, foreign file without a name, weights that do not fit, another name
    than the checkpoint's own.
    """
    metadata = read_metadata(path) if path.suffix == ".safetensors" else None
    weights = read_weights(path)
    if metadata is None:
        if name is None:
            raise UserError(
                f"{path} was not written by irgdistill and does not name its network; name the architecture too"
            )
        return build_network(name, weights=weights, input_size=input_size, origin=str(path)), {}
    if name is not None and name.split(".")[0] != metadata["architecture"]:
        raise UserError(f"{path} holds a {metadata['architecture']}, not a {name}; leave the name out")
    network = build_network(
        metadata["architecture"],
        weights=weights,
        num_classes=metadata["num_classes"],
        input_size=input_size or tuple(metadata["input_size"]),
        args={key: value for key, value in metadata["args"].items() if key != "img_size"},
        preprocessing={key: metadata[key] for key in ("mean", "std", "interpolation", "crop_pct")},
        origin=str(path),
    )
    network.classes = metadata["classes"]
    return network, metadata


# --- the state to go on from ------------------------------------------------------------------------------------------


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Any tree of dicts, lists, numbers, strings and tensors."""
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, "", tensors)
    save_tensors(path, tensors, {"format": FORMAT, "state": packed})


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote. Raises UserError when it is missing or broken."""
    metadata = read_metadata(path)
    if metadata is None or "state" not in metadata:
        raise UserError(f"{path} is not a state of irgdistill")
    state: dict[str, Any] = _unpack(metadata["state"], load_file(path))
    return state


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


def random_states() -> dict[str, Any]:
    """Of Python, numpy, torch and every CUDA device."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
