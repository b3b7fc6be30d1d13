"""Batch normalisation: statistics that keep up with short epochs, and statistics over all processes.

Over processes it is torch's `SyncBatchNorm` on GPUs and `_Sync` on the CPU, which torch lacks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from irgdistill.runtime.distributed import World

RENEWALS = 5
"""Times that an epoch renews the running statistics: what they were before it keeps a share of exp(-5), under 1 %."""


def renew_statistics(model: nn.Module, batches: int) -> None:
    """Raise the momentum of batch norms if an epoch has so few `batches` that statistics would lag behind the weights.

    Networks are evaluated by running statistics. With torch's momentum of 0.1, fourteen batches leave 23 % of those
    before the epoch. Training itself does not read them. The momentum is at most 0.5, a mean of about three batches.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, min(RENEWALS / batches, 0.5))


def sync_batch_norm(model: nn.Module, world: World) -> nn.Module:
    """Compute batch-norm statistics over the images of all processes. The keys of the state dict do not change."""
    if world.size == 1:
        return model
    if next(model.parameters()).is_cuda:
        return cast(nn.Module, convert_sync_batchnorm(model))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # The class is exchanged in place: parameters, buffers, hooks and the identity of the module stay.
            module.__class__ = _SyncAct if isinstance(module, BatchNormAct2d) else _Sync
            module.world = world  # type: ignore[assignment]
    return model


class _Sync(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over all processes on the CPU; torch's own runs on GPUs only."""

    world: World

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = _mean_over(x.mean(axes), self.world)
        x = x - mean.view(shape)
        variance = _mean_over(x.square().mean(axes), self.world)
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), self.world.size * input.numel() / input.shape[1])
        x = x * (variance + self.eps).rsqrt().view(shape)
        return (x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x).to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def _track(self, mean: Tensor, variance: Tensor, count: float) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)


class _SyncAct(_Sync):
    """timm's batch-norm with activation."""

    act: nn.Module
    drop: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.drop(super().forward(input))))


class _MeanOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.mean(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.world.mean(gradients[0]), None


def _mean_over(values: Tensor, world: World) -> Tensor:
    """Mean over the processes, with gradient."""
    return cast(Tensor, _MeanOver.apply(values, world))
