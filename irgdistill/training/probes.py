"""Probes: how well the classes can be read from embeddings that stay as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024
"""Validation embeddings compared at once."""


COLUMNS = 16_384
"""Training embeddings compared at once."""


@torch.no_grad()
def knn_top1(
    train_embeddings: Tensor,
    train_labels: Tensor,
    val_embeddings: Tensor,
    val_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 of the weighted k-nearest-neighbour classifier in percent (Wu et al. 2018, section 3.4; Caron et al. 2021).

    Embeddings (N, D) and (M, D); labels (N,) and (M,), classes from 0. Each of the `k` training embeddings of the
    largest cosine similarity s votes for its class with the weight exp(s / temperature). Of the (M, N) similarities a
    block is held at a time. Raises ValueError for no embeddings.
    """
    if not len(train_embeddings) or not len(val_embeddings):
        raise ValueError(f"k-NN of {len(train_embeddings)} training and {len(val_embeddings)} validation embeddings")
    labels, classes = train_labels.long(), int(train_labels.max()) + 1
    correct = 0
    for own, answers in zip(val_embeddings.split(ROWS), val_labels.split(ROWS), strict=True):
        similarity, nearest = _nearest(F.normalize(own.float(), dim=1), train_embeddings, k)
        votes = similarity.new_zeros(len(own), classes)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == answers).sum())
    return 100 * correct / len(val_embeddings)


def _nearest(own: Tensor, others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and indices (M, min(k, N)) of the nearest of `others` (N, D) to unit vectors `own` (M, D)."""
    best, index = own.new_empty(len(own), 0), torch.empty(len(own), 0, dtype=torch.long, device=own.device)
    for start in range(0, len(others), COLUMNS):
        block = F.normalize(others[start : start + COLUMNS].float(), dim=1)
        best = torch.cat([best, own @ block.T], 1)
        here = torch.arange(start, start + len(block), device=own.device)
        index = torch.cat([index, here.expand(len(own), -1)], 1)
        best, places = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, places)
    return best, index
