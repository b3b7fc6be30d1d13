"""Batch norm of a frozen network folded into the convolutions before it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-4
"""Largest change of a logit that is taken, as a share of the largest logit, in float32."""


@torch.no_grad()
def fold_batch_norm(model: nn.Module, size: tuple[int, int], keep: Collection[str] = ()) -> int:
    """Fold in place -> how many were folded; 0 where the logits would change by more than TOLERANCE.

    `model` is in eval mode and stays so for good; `size` is that of its images; modules named in `keep` stay as they
    are. Only plain convolutions are taken whose output goes into one batch norm: seen in a run on noise, and verified
    by the logits of that run.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta or model.training:
        return 0
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, generator=generator).to(parameter)
    before, pairs = _followed(model, images)
    undo = [_fold(model, conv, norm) for conv, norm in pairs if not {conv, norm} & set(keep)]
    after = _first(model(images))
    if bool((after - before).abs().max() <= TOLERANCE * before.abs().max()):
        return len(undo)
    for conv, weight, bias, parent, leaf, norm in undo:
        conv.weight, conv.bias = weight, bias
        setattr(parent, leaf, norm)
    return 0


def _first(logits: Any) -> Tensor:
    return cast(Tensor, logits[0] if isinstance(logits, (tuple, list)) else logits)


def _followed(model: nn.Module, images: Tensor) -> tuple[Tensor, list[tuple[str, str]]]:
    """Logits, and names of each convolution and the batch norm that it feeds; both run once."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors too, or their ids would be used again
    runs: list[str] = []
    pairs: list[tuple[str, str]] = []

    def watch(name: str, module: nn.Module) -> Iterator[Any]:
        if type(module) in (nn.Conv2d, Conv2dSame):
            yield module.register_forward_hook(lambda _module, _args, out: made.update({id(out): (name, out)}))
            yield module.register_forward_pre_hook(lambda *_: runs.append(name))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.track_running_stats:
            yield module.register_forward_pre_hook(lambda _module, args: meet(name, args[0]))

    def meet(name: str, value: Tensor) -> None:
        runs.append(name)
        if id(value) in made:
            pairs.append((made[id(value)][0], name))

    hooks = [hook for name, module in model.named_modules() for hook in watch(name, module)]
    try:
        logits = _first(model(images))
    finally:
        for hook in hooks:
            hook.remove()
    fed = [conv for conv, _ in pairs]
    return logits, [pair for pair in pairs if all(runs.count(name) == 1 for name in pair) and fed.count(pair[0]) == 1]


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> tuple[Any, ...]:
    """Fold one pair -> what undoes it: the convolution with its parameters, the batch norm and its place."""
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = conv.weight, conv.bias
    conv.weight, conv.bias = fuse_conv_bn_weights(
        weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    parent, _, leaf = norm_name.rpartition(".")
    place = model.get_submodule(parent)
    setattr(place, leaf, getattr(norm, "act", nn.Identity()))
    return conv, weight, bias, place, leaf, norm
