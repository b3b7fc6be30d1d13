"""Builds a network, with everything needed to feed it, from its name and perhaps its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in `__all__`
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from irgdistill.config import check_model_args, split_function
from irgdistill.errors import UserError, nearest, nearest_path, one_line
from irgdistill.models.functions import build_from_function
from irgdistill.models.network import Network, NetworkRecord
from irgdistill.models.weights import LOCAL, SOURCES, Weights, classes_of, load_weights


def known_models() -> list[str]:
    """Every name that timm can build here."""
    return list(timm.list_models())


def build_network(
    name: str,
    *,
    pretrained: bool = False,
    weights: Weights | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int] | None = None,
    args: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    meta: bool = False,
) -> Network:
    """Build `name`, with pretrained weights, with `weights` (loaded strictly), or from random ones.

    `preprocessing` may hold mean, std, interpolation and crop_pct that override the network's own; `meta` builds
    shapes without weights, even of the largest networks.
    A network FILE.py:FUNCTION has the weights that its function returns, or `weights`.
    Raises UserError: unknown name (nearest ones), weights that do not fit or cannot be fetched.
    """
    if split_function(name) is not None:
        return build_from_function(
            name,
            weights=weights,
            num_classes=num_classes,
            input_size=input_size,
            args=args,
            preprocessing=preprocessing,
        )
    _check_name(name)
    args = dict(args or {})
    try:
        check_model_args(args)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if args.get("in_chans", 3) != 3:
        raise UserError(f"{name} with in_chans = {args['in_chans']}: images have 3 channels")
    if num_classes is None and weights is not None:
        num_classes = classes_of(name, weights.tensors)
    if input_size is not None and _fixed_size(name, args):
        args["img_size"] = input_size
    try:
        with _quiet_hub():
            device = {"device": "meta"} if meta else {}
            model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **args, **device)
    except Exception as error:  # each constructor raises its own kinds for arguments that do not fit
        if pretrained and isinstance(error, (OSError, RuntimeError)):
            raise UserError(
                f"no pretrained weights of {name} could be fetched ({one_line(error)}); "
                "give a file with --checkpoint (distill: --teacher-checkpoint, --student-checkpoint), "
                "or start from random weights: --set student.pretrained=false"
            ) from None
        wanted = {**args, **({} if num_classes is None else {"num_classes": num_classes})}
        if isinstance(error, TypeError) or args:
            raise UserError(f"{name} does not accept {wanted}: {one_line(error, 300)}") from None
        raise UserError(f"{name} cannot be built: {one_line(error)}") from None
    if weights is not None:
        load_weights(model, weights, name)
    return Network.of(model, name, args, input_size, preprocessing)


def rebuild_network(
    record: NetworkRecord,
    *,
    input_size: tuple[int, int] | None = None,
    weights: Weights | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    meta: bool = False,
) -> Network:
    """Build the network of a record, at its own input size and with its own preprocessing, or what is given of them.

    Raises UserError as `build_network` does.
    """
    size, preprocessing = input_size or record.input_size, {**record.preprocessing, **(preprocessing or {})}
    if record.code is not None:
        return build_from_function(
            record.name,
            weights=weights,
            num_classes=record.num_classes,
            input_size=size,
            args=record.args,
            preprocessing=preprocessing,
            sha256=record.code.sha256,
        )
    return build_network(
        record.architecture,
        weights=weights,
        num_classes=record.num_classes,
        input_size=size,
        args=record.args_without_size,
        preprocessing=preprocessing,
        meta=meta,
    )


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the retries of huggingface_hub: only the final failure matters to the user."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def parameters(model: nn.Module) -> int:
    """Number of parameters, trainable and frozen."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(network: Network) -> int:
    """Multiply-adds for one image, counted on the meta device."""
    with FlopCounterMode(display=False) as counter:
        network.run_on_meta(network.model)
    return int(counter.get_total_flops()) // 2


def _check_name(name: str) -> None:
    if name.startswith(SOURCES):
        if not name.startswith(LOCAL):
            _check_repository(name)
        if name.startswith(LOCAL) and not (Path(name.removeprefix(LOCAL)) / "config.json").is_file():
            raise UserError(f"{name}: no config.json in that folder")
        return
    if Path(name).suffix == ".py":
        raise UserError(f"{name}: expected {name}:FUNCTION, with a function of that file that returns the network")
    if not timm.is_model(name):
        elsewhere = ", and no folder or file here" if "/" in name or Path(name).suffix else ""
        known = [m.split(".")[0] for m in known_models()]
        near = nearest_path(name) if elsewhere else nearest(name, known) or nearest_path(name)
        raise UserError(f"unknown model {name!r}{elsewhere}{near}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise UserError(f"unknown weights {name!r}{nearest(name, tags)}") from None


def _check_repository(name: str) -> None:
    repository = name.partition(":")[2].partition("@")[0]
    try:
        validate_repo_id(repository)
        if not repository:
            raise HFValidationError("no repository is named")
    except HFValidationError:
        raise UserError(f"{name}: expected hf-hub:OWNER/NAME, perhaps with @REVISION") from None


def _fixed_size(name: str, args: Mapping[str, Any]) -> bool:
    if name.startswith(SOURCES) or args.get("dynamic_img_size"):
        return False
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg is not None and cfg.fixed_input_size)
