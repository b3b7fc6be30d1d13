"""Builds networks that a function in a Python file makes: any `nn.Module` that returns logits (B, K).

A file runs only after the user named it on the command line, which imported it as a plug-in. What a checkpoint or a
cache records finds the imported file by its checksum, else by its path or name, and imports none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from irgdistill.config import PluginConfig, join_function, split_function
from irgdistill.errors import UserError, nearest, one_line
from irgdistill.io import Report
from irgdistill.models.network import Network
from irgdistill.models.weights import Weights, load_weights
from irgdistill.plugins import find_plugin


def build_from_function(
    name: str,
    *,
    weights: Weights | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int] | None = None,
    args: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    sha256: str | None = None,
) -> Network:
    """Call the function of `name`, FILE.py:FUNCTION, with `args`, and with `num_classes` if it takes them.

    The weights are what the function returns, or `weights` (loaded strictly); input size and preprocessing are 224
    pixels and ImageNet's, unless others are given. `sha256`: the file that is expected; another one warns. Raises
    UserError: a file that was not imported, no such function, one that raises or returns no network for images of this
    size, weights that do not fit.
    """
    made = split_function(name)
    assert made is not None
    path, function = made
    public = join_function(Path(path.name), function)
    found = find_plugin(path, sha256)
    if found is None:
        raise UserError(f"{public} is code, which runs only if you name its file: add --plugin {path}")
    module, checksum = found
    if sha256 not in (None, checksum):
        Report().warn(f"{path.name} is not the file that made this network (sha256 {checksum[:12]}, was {sha256[:12]})")
    make = _find(module, public, function)
    kwargs = _arguments(public, make, args or {}, num_classes)
    try:
        network = make(**kwargs)
    except Exception as error:  # of the user's own code
        raise UserError(f"{public} raises {type(error).__name__}: {one_line(error, 300)}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"{public} returns {type(network).__name__}, not a torch.nn.Module")
    if num_classes == 0:
        network.num_classes = 0  # type: ignore[assignment]  # its output is its embedding
    if weights is not None:
        load_weights(network, weights, public)
    built = Network.of(network, public, args, input_size, preprocessing)
    built.code = PluginConfig(path=Path(path.name), sha256=checksum)
    built.check_output()
    return built


def _find(module: ModuleType, name: str, function: str) -> Callable[..., Any]:
    """The function or class that `module` itself defines, so that a recorded name can call nothing it imports."""
    own = {
        key: value
        for key, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", None) == module.__name__
        and not isinstance(value, nn.Module)
    }
    if function not in own:
        known = f" (it defines {', '.join(own)})" if own else ""
        raise UserError(f"{name}: the file defines no function {function!r}{nearest(function, own)}{known}")
    return own[function]  # type: ignore[no-any-return]


def _arguments(
    name: str, function: Callable[..., Any], given: Mapping[str, Any], num_classes: int | None
) -> dict[str, Any]:
    """`given`, and `num_classes` if it is known and an argument. Raises UserError: one is unknown, another required."""
    signature, arguments = inspect.signature(function), dict(given)
    if num_classes is not None and "num_classes" in signature.parameters:
        arguments["num_classes"] = num_classes
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"{name} cannot be called with {arguments or 'no arguments'}: {one_line(error)}") from None
    return arguments
