"""Weights that describe themselves: safetensors with all that rebuilds and feeds their network. No pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from irgdistill.errors import UserError
from irgdistill.io import FORMAT, read_metadata, read_tensors
from irgdistill.models.build import build_network, rebuild_network
from irgdistill.models.network import Network
from irgdistill.models.weights import read_weights


def describe(network: Network, classes: list[str]) -> dict[str, Any]:
    """The part of a checkpoint's metadata that rebuilds and feeds its network."""
    return {"format": FORMAT, **network.describe(), "classes": classes}


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
        "pretrained_cfg": {**keep, "input_size": list(network.input.shape), **network.input.preprocessing},
    }


def described(path: Path) -> dict[str, Any] | None:
    """What a checkpoint of ours says of itself; None for any other file of weights.

    Raises UserError: unreadable, or the state of a run.
    """
    metadata = read_metadata(path) if path.suffix == ".safetensors" else None
    if metadata is not None and "architecture" not in metadata:
        raise UserError(f"{path} is the state of a run; its weights are in best.safetensors and last.safetensors")
    return metadata


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights, and what `described` says. Raises UserError as that does, and for weights that were damaged."""
    return (read_weights(path), None) if described(path) is None else read_tensors(path)


def restore(
    path: Path, name: str | None = None, input_size: tuple[int, int] | None = None
) -> tuple[Network, dict[str, Any]]:
    """A network from a checkpoint: ours by itself, any other one given its `name`. Second value: metadata, or {}.

    Raises UserError: unreadable, truncated or damaged file, foreign file without a name, weights that do not fit,
    another name than the checkpoint's own.
    """
    weights, metadata = read_checkpoint(path)
    if metadata is None:
        if name is None:
            raise UserError(
                f"{path} was not written by irgdistill and does not name its network; name the architecture too"
            )
        return build_network(name, weights=weights, input_size=input_size, origin=str(path)), {}
    if name is not None and name.split(".")[0] != metadata["architecture"]:
        raise UserError(f"{path} holds a {metadata['architecture']}, not a {name}; leave the name out")
    network = rebuild_network(metadata, weights=weights, input_size=input_size, origin=str(path))
    network.classes = metadata["classes"]
    return network, metadata
