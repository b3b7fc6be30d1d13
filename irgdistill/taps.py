"""One forward of a network -> logits and pooled block outputs.

Hooks stand on the blocks that the plan names and pool at once, so nothing larger than (B, C) is kept and nothing can be
changed in place afterwards; whole maps are kept where a term asks for them, as copies. Hooks are installed once,
before any `torch.compile`, and live on this wrapper's model; what is saved is that model's `state_dict`, in which
nothing of the tapping appears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irgdistill.errors import UserError
from irgdistill.levels import Tap, pool


class Output(NamedTuple):
    """What a network says about a batch."""

    logits: Tensor
    """(B, K)"""
    features: dict[str, Tensor]
    """Tap name -> (B, C), float32"""
    maps: dict[str, Tensor] = {}  # noqa: RUF012  never changed
    """Tap name -> (B, C, H, W), where asked for"""
    energies: dict[str, Tensor] = {}  # noqa: RUF012
    """Tap name -> (B, H, W), float32: squares summed over the channels, where asked for"""
    adapted: dict[str, dict[str, Tensor]] = {}  # noqa: RUF012
    """Term -> what its adapter makes of this output; see `losses.Learner`"""


def tap_name(tap: Tap) -> str:
    """Unique, readable key of a tap: its module, and the element of a tuple that is taken there."""
    return tap.module + ("" if tap.index is None else f"[{tap.index}]")


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


def _energy_or_map(output: Tensor | Sequence[Any], tap: Tap) -> Tensor:
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


class View(nn.Module):
    """Raw images -> what one network expects: its own size, its own mean and standard deviation.

    Input (B, 3, H, W) in 0…255, uint8 or float; output (B, 3, *size) float32. Teacher and student each have one and see
    the same augmented crop.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: tuple[int, int], mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", 255 * torch.tensor(tuple(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(tuple(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        return (x - self.mean) / self.std


class Tapped(nn.Module):
    """A network behind its view, with pooled taps. `forward` (B, 3, H, W) raw images -> `Output`.

    `taps` are pooled, `maps` kept whole, `energies` summed over the channels. Without a view, images are taken as they
    are.
    """

    def __init__(
        self,
        model: nn.Module,
        view: View | None,
        taps: Iterable[Tap] = (),
        channels_last: bool = False,
        maps: Iterable[Tap] = (),
        energies: Iterable[Tap] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.view = view
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._kept: tuple[dict[str, Tensor], ...] = ({}, {}, {})
        wanted = ((taps, pool), (maps, feature_map), (energies, _energy_or_map))
        self._hooks = [
            self._install(tap, kept, take)
            for kept, (places, take) in zip(self._kept, wanted, strict=True)
            for tap in places
        ]

    def forward(self, images: Tensor) -> Output:
        self._forget()
        seen = images if self.view is None else self.view(images)
        logits = self.model(seen.contiguous(memory_format=self.memory_format))
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        features, maps, attended = (dict(kept) for kept in self._kept)
        energies = {name: energy(x) if x.dim() == 4 else x for name, x in attended.items()}
        output = Output(logits, features, maps, energies)
        self._forget()
        return output

    def _forget(self) -> None:
        for kept in self._kept:
            kept.clear()

    def release(self) -> nn.Module:
        """Remove the hooks and give back the plain model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        return self.model

    def _install(self, tap: Tap, kept: dict[str, Tensor], take: Callable[[Any, Tap], Tensor]) -> Any:
        module, name = self.model.get_submodule(tap.module), tap_name(tap)

        def keep(value: Any) -> None:
            # Gradient checkpointing runs the block, and this hook, again in backward: the first value counts.
            if name not in kept:
                kept[name] = take(value, tap)

        return module.register_forward_hook(lambda _module, _args, output: keep(output))


def has_unused_parameters(network: Tapped) -> bool:
    """Whether some parameters get no gradient from logits and taps (a second head); found on shapes alone."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    meta = {name: value.detach().to("meta").requires_grad_(value.requires_grad) for name, value in tensors.items()}
    wanted = [value for value in meta.values() if value.requires_grad]
    assert network.view is not None
    image = torch.empty(2, network.view.mean.shape[1], *network.view.size, device="meta")
    with torch.random.fork_rng(devices=[]):
        output = torch.func.functional_call(network, meta, (image,))
        total = sum((x.sum() for found in output[1:4] for x in found.values()), start=output.logits.sum())
        return None in torch.autograd.grad(total, wanted, allow_unused=True)
