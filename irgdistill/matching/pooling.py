"""What is taken at a tap: pooled features, whole maps, attention energies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irgdistill.errors import UserError
from irgdistill.matching.levels import Tap


def pool(output: Tensor | Sequence[Any], tap: Tap) -> Tensor:
    """Mean over the map of what stands at `tap`, of any batch and size -> (B, C), float32 (float64 stays).

    A tuple is what the module returned: `tap.index` is taken from it, or its tensors are joined along C.
    """
    if not isinstance(output, Tensor):
        items = output if tap.index is None else [output[tap.index]]
        return torch.cat([pool(item, tap) for item in items if isinstance(item, Tensor)], dim=1)
    if tap.prefix:
        output = output[:, tap.prefix :]
    axes = [axis for axis, letter in enumerate(tap.layout) if axis > 0 and letter != "C"]
    pooled: Tensor = _MapMean.apply(output, axes)
    return pooled


class _MapMean(torch.autograd.Function):
    """Mean over `axes`; its gradient is one vector seen at each pixel, where torch's own fills a float32 map.

    Where the channels lie innermost, it is a row of pixels seen at each height: what adds a vector of few channels to a
    map pixel by pixel takes ten times as long as adding two maps. A CPU writes a narrow map in float32 before it adds;
    a few images at a time, so that this copy stays in the processor's cache.
    """

    COPY = 8 << 20
    """Bytes of that copy: the fastest on two cores of large and small maps; a single image is slower than two"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: list[int]) -> Tensor:
        ctx.axes, ctx.shape, ctx.dtype = axes, x.shape, x.dtype
        ctx.format = torch.channels_last if axes == [2, 3] else torch.contiguous_format
        ctx.by_row = len(axes) == 2 and x.is_contiguous(memory_format=ctx.format)
        wide = torch.promote_types(x.dtype, torch.float32)
        if x.dtype == wide or x.device.type != "cpu" or torch.compiler.is_compiling():
            return x.mean(axes, dtype=wide)
        images = max(2, _MapMean.COPY * len(x) // (x.numel() * wide.itemsize))
        return torch.cat([part.mean(axes, dtype=wide) for part in x.split(images)])

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        share = (outer / (ctx.shape.numel() // outer.numel())).to(ctx.dtype)
        for axis in ctx.axes:
            share = share.unsqueeze(axis)
        if ctx.by_row:
            sizes = [1 if axis == ctx.axes[0] else size for axis, size in enumerate(ctx.shape)]
            share = share.expand(sizes).contiguous(memory_format=ctx.format)
        return share.expand(ctx.shape), None


MAP_LAYOUTS = ("NCHW", "NHWC", "BLC")
"""Layouts whose map can be laid out as (B, C, H, W); tiles and patches cannot."""


def feature_map(output: Tensor | Sequence[Any], tap: Tap) -> Tensor:
    """What stands at `tap`, laid out as (B, C, H, W); prefix tokens are left out. `tap.layout` is one of MAP_LAYOUTS.

    Tokens at another size than the network was read at keep the map's aspect ratio. Raises UserError where they fill no
    such map. It is a copy: what follows the tap may change it in place.
    """
    return _laid_out(output, tap).clone()


def _laid_out(output: Tensor | Sequence[Any], tap: Tap) -> Tensor:
    if not isinstance(output, Tensor):
        items = output if tap.index is None else [output[tap.index]]
        return torch.cat([_laid_out(item, tap) for item in items if isinstance(item, Tensor)], dim=1)
    if tap.layout == "NCHW":
        return output
    if tap.layout == "NHWC":
        return output.permute(0, 3, 1, 2)
    tokens: Tensor = output[:, tap.prefix :].transpose(1, 2)
    count = tokens.shape[2]
    height = round((count * tap.height / tap.width) ** 0.5)
    if count % height:
        raise UserError(f"{tap.module}: {count} tokens fill no map in the proportion {tap.height}×{tap.width}")
    return tokens.reshape(*tokens.shape[:2], height, count // height)


def energy_or_map(output: Tensor | Sequence[Any], tap: Tap) -> Tensor:
    """The energies (B, H, W); where they need a gradient the map, whose squares are summed outside of blocks that
    gradient checkpointing runs again.
    """
    return feature_map(output, tap) if torch.is_grad_enabled() else energy(_laid_out(output, tap))


def energy(feature_map: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W), float32 (float64 stays): squares summed over the channels; no wider map is made."""
    energies: Tensor = _Energy.apply(feature_map)
    return energies


class _Energy(torch.autograd.Function):
    """Fewer than 32 channels that lie innermost a CPU multiplies pixel by pixel: with a factor as wide as the map that
    takes a fifth of the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        few = x.device.type == "cpu" and x.shape[1] < 32 and x.stride(1) == 1
        ctx.widened = few and not torch.compiler.is_compiling()
        wide = torch.promote_types(x.dtype, torch.float32)
        lengths: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=wide)
        return lengths.square()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        factor = (2 * outer).to(x.dtype).unsqueeze(1)
        if ctx.widened:
            factor = torch.empty_like(x).copy_(factor)
        return x * factor
