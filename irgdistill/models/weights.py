"""Reads weights from files and loads them into a model."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from irgdistill.errors import UserError

LOCAL = "local-dir:"


SOURCES = ("hf-hub:", "hf_hub:", LOCAL)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], name: str, origin: str) -> None:
    """Load strictly. Raises UserError that says what is missing, left over or of another shape."""
    own = model.state_dict()
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    missing, extra = [k for k in own if k not in weights], [k for k in weights if k not in own]
    for problem, names in (("lack", missing), ("have, beyond it,", extra), ("differ in shape at", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"the weights in {origin} do not fit {name}: they {problem} {', '.join(names[:3])}{more}")
    model.load_state_dict(dict(weights), strict=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a .safetensors or .pth file, never unpickling code. Raises UserError when it cannot be read."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        weights = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is truncated or no checkpoint: {short_reason(error)}") from None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} does not hold a dictionary of weights")
    return dict(weights)


def classes_of(name: str, weights: Mapping[str, Tensor]) -> int | None:
    """Number of classes from the shape of the classifier in `weights`, None where it does not say."""
    cfg = None if name.startswith(SOURCES) else timm.get_pretrained_cfg(name)
    head = cfg.classifier if cfg is not None else None
    for key in [head] if isinstance(head, str) else list(head or ()):
        for suffix in (".bias", ".weight"):
            if key + suffix in weights:
                return int(weights[key + suffix].shape[0])
    return None


def short_reason(error: BaseException) -> str:
    return textwrap.shorten(str(error), 160, placeholder=" …") or type(error).__name__
