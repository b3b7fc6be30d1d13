"""Reads the embedding of an image: the input of a network's classifier, or the output of a network without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from irgdistill.config import Pooling
from irgdistill.errors import UserError

Keep = Callable[[Tensor], None]


class EmbeddingHook:
    """Keeps the embedding (B, D) of each forward pass of `model`.

    `auto` takes the network's own: the input of its classifier, which timm names; in other modules, of the last linear
    layer whose output is the network's output; the output itself if there is none, or if the module's `num_classes` is
    0. `cls` and `mean` read the tokens
    after the last norm of a transformer, `cls+mean` joins both. Raises UserError if the network has no such tokens.
    """

    def __init__(self, model: nn.Module, pooling: Pooling = "auto") -> None:
        self._kept: Tensor | None = None
        self._output: Any = None
        self._headless = False
        if pooling != "auto":
            self.handles = [_hook_tokens(model, pooling, self._keep)]
            return
        known = hasattr(model, "get_classifier")
        self._headless = not known and getattr(model, "num_classes", None) == 0
        classifier = model.get_classifier() if known else None  # type: ignore[operator]
        if isinstance(classifier, (tuple, list, nn.ModuleList)):  # several heads on one embedding
            classifier = next(iter(classifier), None)
        if isinstance(classifier, nn.Module):
            self.handles = [classifier.register_forward_pre_hook(lambda _module, args: self._keep(args[0]))]
        else:
            linear = [] if known else [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
            self.handles = [layer.register_forward_hook(self._keep_last) for layer in linear]

    def take(self, output: Tensor) -> Tensor:
        """The embedding (B, D) of the pass that returned `output`, float32 (float64 stays). Forgets it."""
        kept, last, self._kept, self._output = self._kept, self._output, None, None
        whole = kept is None or (last is not None and last is not output) or (self._headless and output.shape[1] > 0)
        embedding = _flat(output) if kept is None or whole else kept
        return embedding.to(torch.promote_types(embedding.dtype, torch.float32))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def _keep(self, embedding: Tensor) -> None:
        self._kept = _flat(embedding)

    def _keep_last(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args[0].dim() == 2:
            self._kept, self._output = args[0], output


def _flat(x: Tensor) -> Tensor:
    """(B, D), (B, N, D) tokens or a (B, D, H, W) map -> (B, D)."""
    if x.dim() == 3:
        return x.mean(1)
    return x if x.dim() == 2 else x.flatten(2).mean(2)


def _hook_tokens(model: nn.Module, pooling: Pooling, keep: Keep) -> Any:
    norm, prefix = getattr(model, "norm", None), int(getattr(model, "num_prefix_tokens", 0))
    name = type(model).__name__
    if not isinstance(norm, nn.Module) or not hasattr(model, "num_prefix_tokens"):
        raise UserError(f"{name} has no tokens to pool by {pooling}: expected auto")
    if "cls" in pooling and (not prefix or getattr(model, "cls_token", True) is None):
        raise UserError(f"{name} has no class token to pool by {pooling}: expected auto or mean")
    after = getattr(model, "fc_norm", None)

    def read(_module: nn.Module, _args: Any, tokens: Tensor) -> None:
        parts = []
        if "cls" in pooling:
            parts.append(tokens[:, 0])
        if "mean" in pooling:
            mean = tokens[:, prefix:].mean(1)
            parts.append(after(mean) if isinstance(after, nn.Module) else mean)
        keep(torch.cat(parts, 1))

    return norm.register_forward_hook(read)
