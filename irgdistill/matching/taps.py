"""Runs a network and collects logits and pooled block outputs in one forward.

Hooks on the blocks of the plan pool at once, to (B, C) or to a grid of cells: nothing larger is kept, and nothing can
be changed in place afterwards. Whole maps are copied, if a term needs them. Hooks are installed once, before any
`torch.compile`; the model's `state_dict` does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from irgdistill.config import Pooling
from irgdistill.matching.embedding import EmbeddingHook
from irgdistill.matching.levels import Tap
from irgdistill.matching.pooling import energy, energy_or_map, feature_map, grid, pool


class Output(NamedTuple):
    """Outputs of one network for a batch."""

    logits: Tensor
    """(B, K)"""
    features: dict[str, Tensor]
    """Tap name -> (B, C), float32"""
    maps: dict[str, Tensor] = {}  # noqa: RUF012  never changed
    """Tap name -> (B, C, H, W), for the requested taps"""
    energies: dict[str, Tensor] = {}  # noqa: RUF012
    """Tap name -> (B, H, W), float32: squares summed over the channels, for the requested taps"""
    grids: dict[str, Tensor] = {}  # noqa: RUF012
    """Tap name -> (B, C, h, w), float32: means over the cells of `pooling.grid`, for the requested taps"""
    adapted: dict[str, dict[str, Tensor]] = {}  # noqa: RUF012
    """Term -> output of its adapter; see `losses.Learner`"""
    embedding: Tensor | None = None
    """(B, D), float32: the pooled last feature, if it is asked for"""


def first_output(output: Any) -> Tensor:
    """The logits: the output of a network, or the first of several."""
    logits: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return logits


def tap_name(tap: Tap) -> str:
    """Unique, readable key of a tap: its module, and the index of the tuple element."""
    return tap.module + ("" if tap.index is None else f"[{tap.index}]")


class Tapped(nn.Module):
    """A network with taps. `forward` (B, 3, H, W) raw images -> `Output`.

    `taps` are pooled, `maps` kept whole, `energies` summed over the channels, `grids` averaged over cells. `preprocess`
    resizes and normalises raw images; None: the images are prepared already. `embedding`: also return the embedding,
    pooled in this way.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: nn.Module | None,
        taps: Iterable[Tap] = (),
        channels_last: bool = False,
        maps: Iterable[Tap] = (),
        energies: Iterable[Tap] = (),
        grids: Iterable[Tap] = (),
        embedding: Pooling | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._kept: tuple[dict[str, Tensor], ...] = ({}, {}, {}, {})
        kinds = ((taps, pool), (maps, feature_map), (energies, energy_or_map), (grids, grid))
        self._hooks = [
            self._install(tap, kept, read)
            for kept, (tapped, read) in zip(self._kept, kinds, strict=True)
            for tap in tapped
        ]
        self._embedding = None if embedding is None else EmbeddingHook(model, embedding)

    def forward(self, images: Tensor) -> Output:
        self._clear()
        inputs = images if self.preprocess is None else self.preprocess(images)
        logits = first_output(self.model(inputs.contiguous(memory_format=self.memory_format)))
        features, maps, energies_or_maps, grids = (dict(kept) for kept in self._kept)
        energies = {name: energy(x) if x.dim() == 4 else x for name, x in energies_or_maps.items()}
        embedding = None if self._embedding is None else self._embedding.take(logits)
        output = Output(logits, features, maps, energies, grids, embedding=embedding)
        self._clear()
        return output

    def _clear(self) -> None:
        for kept in self._kept:
            kept.clear()

    def release(self) -> nn.Module:
        """Remove the hooks and return the plain model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._embedding is not None:
            self._embedding.remove()
        return self.model

    def _install(self, tap: Tap, kept: dict[str, Tensor], read: Callable[[Any, Tap], Tensor]) -> Any:
        module, name = self.model.get_submodule(tap.module), tap_name(tap)

        def keep(value: Any) -> None:
            # Gradient checkpointing runs the block and this hook again in backward: keep the first value.
            if name not in kept:
                kept[name] = read(value, tap)

        return module.register_forward_hook(lambda _module, _args, output: keep(output))


def has_unused_parameters(network: Tapped, shape: tuple[int, int, int]) -> bool:
    """Whether some parameters, such as a second head, get no gradient from logits and taps.

    `shape` is that of an image, (C, H, W). Runs on the meta device.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    meta = {name: value.detach().to("meta").requires_grad_(value.requires_grad) for name, value in tensors.items()}
    wanted = [value for value in meta.values() if value.requires_grad]
    image = torch.empty(2, *shape, device="meta")
    with torch.random.fork_rng(devices=[]):
        output = torch.func.functional_call(network, meta, (image,))
        total = sum((x.sum() for found in output[1:5] for x in found.values()), start=output.logits.sum())
        return None in torch.autograd.grad(total, wanted, allow_unused=True)
