"""Reads weights from files and loads them into a model."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from irgdistill.errors import UserError, one_line
from irgdistill.io import read_tensors
from irgdistill.models.foreign import tensor_dicts
from irgdistill.models.network import pretrained_cfg

LOCAL = "local-dir:"


SOURCES = ("hf-hub:", "hf_hub:", LOCAL)


class Weights(NamedTuple):
    """Weights to load, and where they come from."""

    tensors: Mapping[str, Tensor]
    origin: str
    note: str = ""
    """What was taken of the file and how it was changed, where there was a choice."""
    args: Mapping[str, Any] = MappingProxyType({})
    """Arguments of `timm.create_model` that the network needs for them."""


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


def read_weights(path: Path) -> dict[str, dict[str, Tensor]]:
    """Every dictionary of tensors in a .safetensors or .pth file, by its place in the file, without unpickling code.

    Raises UserError if the file cannot be read or holds none.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    found = tensor_dicts(read_tensors(path)[0] if path.suffix == ".safetensors" else _load(path))
    if not found:
        raise UserError(f"{path} does not hold a dictionary of weights")
    return found


def _load(path: Path) -> object:
    try:
        with safe_globals([argparse.Namespace]):  # in checkpoints of timm
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))  # in each of torch's refusals, for both of its file formats
        if refused is not None:
            raise UserError(
                f"{path} holds Python objects ({refused[1]}), not weights alone, and reading them may run any code; "
                f"if you trust it, run in Python: model = torch.load({str(path)!r}, weights_only=False); "
                "torch.save(model.state_dict(), 'weights.pth')  (of a dictionary: model['state_dict'])"
            ) from None
        raise UserError(f"{path} is truncated or no checkpoint: {one_line(error)}") from None


def classes_of(name: str, weights: Mapping[str, Tensor]) -> int | None:
    """Number of classes, from the shape of the classifier in `weights`; 0 if they have none, as those of encoders.

    None if it is not known what the classifier is called.
    """
    cfg = None if name.startswith(SOURCES) else timm.get_pretrained_cfg(name)
    head = cfg.classifier if cfg is not None else None
    heads = [head] if isinstance(head, str) else list(head or ())
    for key in heads:
        for suffix in (".bias", ".weight"):
            if key + suffix in weights:
                return int(weights[key + suffix].shape[0])
    return 0 if heads else None


def classifier_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier's layers by name, as timm's configuration names them; none if it does not or there are none."""
    names: Any = pretrained_cfg(model).get("classifier") or ()
    known = dict(model.named_modules())
    return {name: known[name] for name in ([names] if isinstance(names, str) else names) if name in known}


def classifier_keys(model: nn.Module) -> list[str]:
    """Keys of the classifier in the state dict."""
    return [f"{name}.{key}" for name, module in classifier_modules(model).items() for key in module.state_dict()]
