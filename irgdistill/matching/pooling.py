"""Reads the output at a tap: pooled features, whole maps, grids of cells, attention energies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irgdistill.errors import UserError
from irgdistill.matching.levels import Tap


def pool(output: Tensor | Sequence[Any], tap: Tap) -> Tensor:
    """Mean over the map at `tap`, for any batch and size -> (B, C), float32 (float64 stays float64).

    From a tuple, the element `tap.index` is taken, or all its tensors are joined along C.
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
    """Mean over `axes`. Its gradient is one vector expanded over the map; torch's own fills a float32 map.

    For channels-last maps the gradient is materialised as one row and expanded over the height: adding a broadcast
    vector of few channels would be 10× slower. On a CPU the mean of a half-precision map first makes a float32 copy:
    a few images at a time, so that the copy stays in the processor's cache.
    """

    COPY = 8 << 20
    """Bytes of that copy, the fastest for large and small maps on two cores; at least two images"""

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
    """The map at `tap`, laid out as (B, C, H, W) without prefix tokens. `tap.layout` is one of MAP_LAYOUTS.

    Tokens of images of another size keep the map's aspect ratio. Raises UserError if they fill no such map. Returns a
    copy: later layers may change the output in place.
    """
    return _as_nchw(output, tap).clone()


def _as_nchw(output: Tensor | Sequence[Any], tap: Tap) -> Tensor:
    if not isinstance(output, Tensor):
        items = output if tap.index is None else [output[tap.index]]
        return torch.cat([_as_nchw(item, tap) for item in items if isinstance(item, Tensor)], dim=1)
    if tap.layout == "NCHW":
        return output
    if tap.layout == "NHWC":
        return output.permute(0, 3, 1, 2)
    tokens: Tensor = output[:, tap.prefix :].transpose(1, 2)
    count = tokens.shape[2]
    height = round((count * tap.height / tap.width) ** 0.5)
    if count % height:
        raise UserError(f"{tap.module}: {count} tokens do not fill a map of the aspect ratio {tap.height}:{tap.width}")
    return tokens.reshape(*tokens.shape[:2], height, count // height)


GRID = 8
"""Most cells of a grid along each side."""


def grid(output: Tensor | Sequence[Any], tap: Tap) -> Tensor:
    """The map at `tap`, averaged over cells -> (B, C, h, w) with h, w ≤ GRID, float32 (float64 stays float64).

    Cells do not overlap: they are squares of ceil(H / GRID) × ceil(W / GRID) pixels, smaller at the lower and right
    border if these do not divide the map. `tap.layout` is one of MAP_LAYOUTS. Raises UserError as `feature_map`.
    """
    x = _as_nchw(output, tap)
    cell = -(-x.shape[2] // GRID), -(-x.shape[3] // GRID)
    if cell == (1, 1):
        return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    cells: Tensor = _CellMean.apply(x, cell)
    return cells


class _CellMean(torch.autograd.Function):
    """Mean over cells. It keeps no tensor for the backward pass: gradient checkpointing runs the hook again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cell: tuple[int, int]) -> Tensor:
        ctx.shape, ctx.dtype, ctx.cell = x.shape, x.dtype, cell
        ctx.format = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
        return F.avg_pool2d(x.to(torch.promote_types(x.dtype, torch.float32)), cell, ceil_mode=True)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        shape = torch.empty(ctx.shape, dtype=outer.dtype, device=outer.device, memory_format=ctx.format)
        outer = outer.contiguous(memory_format=ctx.format)
        share = torch.ops.aten.avg_pool2d_backward(outer, shape, ctx.cell, ctx.cell, (0, 0), True, True, None)
        return share.to(ctx.dtype), None


def energy_or_map(output: Tensor | Sequence[Any], tap: Tap) -> Tensor:
    """Energies (B, H, W), or the whole map when gradients are on.

    The squares of that map are then summed in `forward`, because gradient checkpointing runs the hook again.
    """
    return feature_map(output, tap) if torch.is_grad_enabled() else energy(_as_nchw(output, tap))


def energy(feature_map: Tensor) -> Tensor:
    """Sum of squares over the channels: (B, C, H, W) -> (B, H, W), float32 (float64 stays), without a wider map."""
    energies: Tensor = _Energy.apply(feature_map)
    return energies


class _Energy(torch.autograd.Function):
    """Sum of squares over the channels.

    On a CPU, scaling a channels-last map of fewer than 32 channels by a broadcast factor is 5× slower than by a factor
    of full size.
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
