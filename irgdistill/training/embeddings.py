"""Embeddings of all images of a source, in one array."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from irgdistill.data import OnePass
from irgdistill.io import Report
from irgdistill.models import Network
from irgdistill.runtime import autocast


@torch.no_grad()
def embed(network: Network, images: OnePass, amp: str, report: Report) -> tuple[Tensor, Tensor]:
    """Embeddings (n, D) float32 of the n images that can be read, and their positions (n,), in order, on the CPU.

    Raises DataError as `OnePass`.
    """
    device = images.loader.device
    view = network.preprocess().to(device)
    network.model.to(device).eval()
    precision, start, count = autocast(amp, device), time.perf_counter(), 0
    found, positions = torch.empty(0), torch.empty(len(images), dtype=torch.long)
    with report.progress(len(images), 0):
        for batch, numbers in images:
            with precision:
                embedding = _embedding(network, view(batch)).float()
            if not count:
                found = torch.empty(len(images), embedding.shape[1])
            end = count + len(numbers)
            found[count:end], positions[count:end], count = embedding, numbers, end
            report.advance(int(numbers[-1]) + 1, "embedding", {}, count / (time.perf_counter() - start))
    return found[:count], positions[:count]


def _embedding(network: Network, images: Tensor) -> Tensor:
    """The input of the classifier (B, D); of a network without one, its output, pooled over positions."""
    model: Any = network.model
    if network.num_classes:
        pooled: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
        return pooled
    output: Tensor = model(images)
    return output if output.dim() == 2 else output.mean(1) if output.dim() == 3 else output.mean((2, 3))
