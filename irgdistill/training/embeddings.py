"""Embeddings of all images of a source, in one array."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from irgdistill.data import OnePass
from irgdistill.io import Report
from irgdistill.matching import Tapped
from irgdistill.models import Network
from irgdistill.runtime import autocast


@torch.no_grad()
def embed(network: Network, images: OnePass, amp: str, report: Report) -> tuple[Tensor, Tensor]:
    """Embeddings (n, D) float32 of the n images that can be read, and their positions (n,), in order, on the CPU.

    Raises DataError as `OnePass`, UserError if the network has no tokens that its kind of pooling reads.
    """
    device = images.loader.device
    tapped = Tapped(network.model.to(device), network.preprocess().to(device), embedding=network.pooling).eval()
    precision, start, count = autocast(amp, device), time.perf_counter(), 0
    found, positions = torch.empty(0), torch.empty(len(images), dtype=torch.long)
    with report.progress(len(images), 0):
        for batch, numbers in images:
            with precision:
                embedding = tapped(batch).embedding
            if not count:
                found = torch.empty(len(images), embedding.shape[1])
            end = count + len(numbers)
            found[count:end], positions[count:end], count = embedding, numbers, end
            report.advance(int(numbers[-1]) + 1, "embedding", {}, count / (time.perf_counter() - start))
    tapped.release()
    return found[:count], positions[:count]
