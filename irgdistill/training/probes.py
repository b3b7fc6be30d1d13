"""Probes: how well the classes can be read from embeddings that stay as they are."""

from __future__ import annotations

import math

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
    leave_one_out: bool = False,
) -> float:
    """Top-1 of the weighted k-nearest-neighbour classifier in percent (Wu et al. 2018, section 3.4; Caron et al. 2021).

    Embeddings (N, D) and (M, D); labels (N,) and (M,), classes from 0. Each of the `k` training embeddings of the
    largest cosine similarity s votes for its class with the weight exp(s / temperature). Of the (M, N) similarities a
    block is held at a time. `leave_one_out`: both are the same images, none of which is its own neighbour. Raises
    ValueError for no embeddings.
    """
    if not len(train_embeddings) or not len(val_embeddings):
        raise ValueError(f"k-NN of {len(train_embeddings)} training and {len(val_embeddings)} validation embeddings")
    labels, classes = train_labels.long(), int(train_labels.max()) + 1
    correct = start = 0
    for own, answers in zip(val_embeddings.split(ROWS), val_labels.split(ROWS), strict=True):
        hidden = torch.arange(start, start + len(own), device=own.device) if leave_one_out else None
        similarity, nearest = _nearest(F.normalize(own.float(), dim=1), train_embeddings, k, hidden)
        start += len(own)
        votes = similarity.new_zeros(len(own), classes)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == answers).sum())
    return 100 * correct / len(val_embeddings)


def _nearest(own: Tensor, others: Tensor, k: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine similarities and indices (M, min(k, N)) of the nearest of `others` (N, D) to unit vectors `own` (M, D).

    `hidden` (M,): one of the others that each does not see.
    """
    best, index = own.new_empty(len(own), 0), torch.empty(len(own), 0, dtype=torch.long, device=own.device)
    for start in range(0, len(others), COLUMNS):
        block = F.normalize(others[start : start + COLUMNS].float(), dim=1)
        similarity, here = own @ block.T, torch.arange(start, start + len(block), device=own.device)
        if hidden is not None:
            similarity.masked_fill_(hidden[:, None] == here, -torch.inf)
        best = torch.cat([best, similarity], 1)
        index = torch.cat([index, here.expand(len(own), -1)], 1)
        best, places = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, places)
    return best, index


STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Strengths of the penalty from which a linear probe chooses."""


def linear_top1(train_embeddings: Tensor, train_labels: Tensor, val_embeddings: Tensor, val_labels: Tensor) -> float:
    """Top-1 in percent of a linear classifier on embeddings, by logistic regression (Radford et al. 2021, section 3.2).

    Embeddings (N, D) and (M, D); labels (N,) and (M,), classes from 0. The strength of the penalty is chosen by the
    cross-entropy on a fifth of the training images of each class, then the classifier is fitted to all. Raises
    ValueError for no embeddings.
    """
    order = torch.argsort(train_labels, stable=True)
    held = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    held[order[4::5]] = True
    if not len(val_embeddings) or not held.any():
        raise ValueError(f"linear probe of {len(order)} training and {len(val_embeddings)} validation embeddings")
    classes = int(train_labels.max()) + 1
    choice = LinearClassifier(train_embeddings[~held], train_labels[~held], classes)
    best, chosen = math.inf, STRENGTHS[0]
    for strength in STRENGTHS:  # each starts from the one before it
        choice.fit(strength)
        found = choice.loss(train_embeddings[held], train_labels[held])
        if found < best:
            best, chosen = found, strength
    final = LinearClassifier(train_embeddings, train_labels, classes)
    final.fit(chosen)
    return final.top1(val_embeddings, val_labels)


class LinearClassifier:
    """Logistic regression on embeddings (N, D), standardised, and labels (N,), by L-BFGS.

    It minimises the mean cross-entropy plus strength / 2 · ‖weight‖²; the bias is not penalised.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, classes: int) -> None:
        self.embeddings, self.labels = embeddings, labels.long()
        deviation, self.mean = torch.std_mean(embeddings.float(), 0, correction=0)
        self.scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / deviation, 0)  # what is constant tells nothing
        width = embeddings.shape[1]
        self.weight = torch.zeros(classes, width, device=embeddings.device, requires_grad=True)
        self.bias = torch.zeros(classes, device=embeddings.device, requires_grad=True)

    def logits(self, embeddings: Tensor) -> Tensor:
        """(B, D) -> (B, K)"""
        return F.linear((embeddings.float() - self.mean) * self.scale, self.weight, self.bias)

    def fit(self, strength: float) -> None:
        """Minimise the objective from the present weight on."""
        search = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=1000,
            tolerance_grad=1e-5,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )
        search.step(lambda: self._objective(search, strength))

    @torch.no_grad()
    def loss(self, embeddings: Tensor, labels: Tensor) -> float:
        """Mean cross-entropy of (M, D) with their labels (M,)."""
        pairs = zip(embeddings.split(COLUMNS), labels.long().split(COLUMNS), strict=True)
        return sum(float(F.cross_entropy(self.logits(x), y, reduction="sum")) for x, y in pairs) / len(labels)

    @torch.no_grad()
    def top1(self, embeddings: Tensor, labels: Tensor) -> float:
        """Percent of (M, D) that are classified as their labels (M,) say."""
        pairs = zip(embeddings.split(COLUMNS), labels.split(COLUMNS), strict=True)
        return 100 * sum(int((self.logits(x).argmax(1) == y).sum()) for x, y in pairs) / len(labels)

    def _objective(self, search: torch.optim.Optimizer, strength: float) -> float:
        search.zero_grad()
        penalty = strength / 2 * self.weight.square().sum()
        penalty.backward()
        total = penalty.item()
        for x, y in zip(self.embeddings.split(COLUMNS), self.labels.split(COLUMNS), strict=True):
            loss = F.cross_entropy(self.logits(x), y, reduction="sum") / len(self.labels)
            loss.backward()
            total += loss.item()
        return total
