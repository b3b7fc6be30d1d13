"""One forward of a network -> logits and pooled block outputs.

Hooks stand on the blocks that the plan names and pool at once, so nothing larger than (B, C) is kept and nothing can be
changed in place afterwards; whole maps are kept where a term asks for them, as copies. Hooks are installed once,
before any `torch.compile`, and live on this wrapper's model; what is saved is that model's `state_dict`, in which
nothing of the tapping appears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from irgdistill.matching.levels import Tap
from irgdistill.matching.pooling import energy, energy_or_map, feature_map, pool


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


class Tapped(nn.Module):
    """A network behind its view, with pooled taps. `forward` (B, 3, H, W) raw images -> `Output`.

    `taps` are pooled, `maps` kept whole, `energies` summed over the channels. Without a view, images are taken as they
    are.
    """

    def __init__(
        self,
        model: nn.Module,
        view: nn.Module | None,
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
        wanted = ((taps, pool), (maps, feature_map), (energies, energy_or_map))
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


def has_unused_parameters(network: Tapped, shape: tuple[int, int, int]) -> bool:
    """Whether some parameters get no gradient from logits and taps (a second head), for images of `shape` (C, H, W).

    Found on the meta device."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    meta = {name: value.detach().to("meta").requires_grad_(value.requires_grad) for name, value in tensors.items()}
    wanted = [value for value in meta.values() if value.requires_grad]
    image = torch.empty(2, *shape, device="meta")
    with torch.random.fork_rng(devices=[]):
        output = torch.func.functional_call(network, meta, (image,))
        total = sum((x.sum() for found in output[1:4] for x in found.values()), start=output.logits.sum())
        return None in torch.autograd.grad(total, wanted, allow_unused=True)
