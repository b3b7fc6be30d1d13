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
    view, model = network.preprocess().to(device), network.model.to(device).eval()
    precision, start, count = autocast(amp, device), time.perf_counter(), 0
    found, positions = torch.empty(0), torch.empty(len(images), dtype=torch.long)
    with report.progress(len(images), 0):
        for batch, numbers in images:
            with precision:
                features: Any = model.forward_features(view(batch))  # type: ignore[operator]
                embedding = model.forward_head(features, pre_logits=True).float()  # type: ignore[operator]
            if not count:
                found = torch.empty(len(images), embedding.shape[1])
            end = count + len(numbers)
            found[count:end], positions[count:end], count = embedding, numbers, end
            report.advance(int(numbers[-1]) + 1, "embedding", {}, count / (time.perf_counter() - start))
    return found[:count], positions[:count]
