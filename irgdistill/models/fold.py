"""Folds the batch norm of a frozen network into the convolutions before it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from irgdistill.matching import first_output

TOLERANCE = 1e-4
"""Largest accepted change of a logit, as a share of the largest logit, in float32."""


@torch.no_grad()
def fold_batch_norm(model: nn.Module, size: tuple[int, int], keep: Collection[str] = ()) -> int:
    """Fold in place and return the number of folded layers; 0 if the logits would change by more than TOLERANCE.

    `model` is in eval mode and must stay in it; `size` is that of its images; modules named in `keep` are not changed.
    Only plain convolutions whose output goes into exactly one batch norm are folded: a run on noise finds them, and
    its logits verify the result.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta or model.training:
        return 0
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, generator=generator).to(parameter)
    before, pairs = _find_pairs(model, images)
    folded = [_fold(model, conv, norm) for conv, norm in pairs if not {conv, norm} & set(keep)]
    after = first_output(model(images))
    if bool((after - before).abs().max() <= TOLERANCE * before.abs().max()):
        return len(folded)
    for pair in folded:
        pair.undo()
    return 0


def _find_pairs(model: nn.Module, images: Tensor) -> tuple[Tensor, list[tuple[str, str]]]:
    """Logits, and the names of each convolution and the batch norm that it feeds; both run exactly once."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors: a freed one's id would be used again
    runs: list[str] = []
    pairs: list[tuple[str, str]] = []

    def watch(name: str, module: nn.Module) -> Iterator[Any]:
        if type(module) in (nn.Conv2d, Conv2dSame):
            yield module.register_forward_hook(lambda _module, _args, out: outputs.update({id(out): (name, out)}))
            yield module.register_forward_pre_hook(lambda *_: runs.append(name))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.track_running_stats:
            yield module.register_forward_pre_hook(lambda _module, args: normalise(name, args[0]))

    def normalise(name: str, value: Tensor) -> None:
        runs.append(name)
        if id(value) in outputs:
            pairs.append((outputs[id(value)][0], name))

    hooks = [hook for name, module in model.named_modules() for hook in watch(name, module)]
    try:
        logits = first_output(model(images))
    finally:
        for hook in hooks:
            hook.remove()
    convolutions = [conv for conv, _ in pairs]
    return logits, [
        pair for pair in pairs if all(runs.count(name) == 1 for name in pair) and convolutions.count(pair[0]) == 1
    ]


class _Folded(NamedTuple):
    """A convolution with its own parameters, and the batch norm that was removed from `parent`."""

    conv: nn.Conv2d
    weight: Any
    bias: Any
    parent: nn.Module
    child: str
    norm: nn.Module

    def undo(self) -> None:
        self.conv.weight, self.conv.bias = self.weight, self.bias
        setattr(self.parent, self.child, self.norm)


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> _Folded:
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = conv.weight, conv.bias
    conv.weight, conv.bias = fuse_conv_bn_weights(
        weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    parent, _, child = norm_name.rpartition(".")
    place = model.get_submodule(parent)
    setattr(place, child, getattr(norm, "act", nn.Identity()))
    return _Folded(conv, weight, bias, place, child, norm)
