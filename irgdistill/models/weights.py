"""Reads weights from files and loads them into a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from irgdistill.errors import UserError, one_line

LOCAL = "local-dir:"


SOURCES = ("hf-hub:", "hf_hub:", LOCAL)


class Weights(NamedTuple):
    """Weights to load, and where they come from."""

    tensors: Mapping[str, Tensor]
    origin: str


def load_weights(model: nn.Module, weights: Weights, name: str) -> None:
    """Load strictly into the model called `name`.

    Raises UserError naming what is missing, left over or of another shape.
    """
    own, given = model.state_dict(), weights.tensors
    shapes = [key for key in own if key in given and own[key].shape != given[key].shape]
    missing, extra = [key for key in own if key not in given], [key for key in given if key not in own]
    for problem, names in (("lack", missing), ("have extra", extra), ("differ in shape at", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            fault = f"they {problem} {', '.join(names[:3])}{more}"
            raise UserError(f"the weights in {weights.origin} do not fit {name}: {fault}")
    model.load_state_dict(dict(given), strict=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a .safetensors or .pth file, without unpickling code. Raises UserError if it cannot be read."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        weights = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is truncated or no checkpoint: {one_line(error)}") from None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} does not hold a dictionary of weights")
    return dict(weights)


def classes_of(name: str, weights: Mapping[str, Tensor]) -> int | None:
    """Number of classes, from the shape of the classifier in `weights`; None if it cannot be found."""
    cfg = None if name.startswith(SOURCES) else timm.get_pretrained_cfg(name)
    head = cfg.classifier if cfg is not None else None
    for key in [head] if isinstance(head, str) else list(head or ()):
        for suffix in (".bias", ".weight"):
            if key + suffix in weights:
                return int(weights[key + suffix].shape[0])
    return None
