"""The precision of a run that `auto` leaves to the machine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from irgdistill.models import Network
from irgdistill.runtime import resolve_precision
from irgdistill.training.setup import Setup

IMAGES = 4
"""Images of a measured step, at most."""


def precision_of(setup: Setup, device: torch.device) -> str:
    """What `runtime.amp` is on a device: none, bf16 or fp16. On a CPU, `auto` measures steps of the run's networks."""
    return resolve_precision(setup.config.runtime.amp, device, lambda: _step(setup))


def _step(setup: Setup) -> None:
    """Forward and backward pass of what is trained, forward pass of live teachers, on images of noise.

    Weights and statistics stay as they are.
    """
    count = min(IMAGES, setup.config.data.batch_size)
    for network in (setup.student, setup.booster):
        if network is not None:
            _train(network.model, _noise(network, count))
    for teacher in setup.teachers:
        if teacher.cache is None:
            with torch.no_grad():
                teacher.network.model.eval()(_noise(teacher.network, count))


def _train(model: nn.Module, images: Tensor) -> None:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    mode = model.training
    output = model.train()(images)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    torch.autograd.grad(output.float().sum(), weights, allow_unused=True)
    model.train(mode)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _noise(network: Network, count: int) -> Tensor:
    return torch.randn(count, *network.input.shape, generator=torch.Generator().manual_seed(0))
