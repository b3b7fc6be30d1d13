"""Probes against the same formulas written as loops."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from irgdistill.training import probes


@pytest.fixture
def clouds() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings and labels of 90 training and 70 validation points around 5 overlapping means."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 8, generator=generator)
    labels = torch.randint(0, 5, (160,), generator=generator)
    points = means[labels] + torch.randn(160, 8, generator=generator)
    return points[:90], labels[:90], points[90:], labels[90:]


def _knn(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, k: int, temperature: float) -> float:
    correct = 0
    for x, label in zip(val.tolist(), val_labels.tolist(), strict=True):
        similar = []
        for y, other in zip(train.tolist(), train_labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            similar.append((dot / math.hypot(*x) / math.hypot(*y), other))
        votes: dict[int, float] = defaultdict(float)
        for cosine, other in sorted(similar, reverse=True)[:k]:
            votes[other] += math.exp(cosine / temperature)
        correct += max(votes, key=lambda each: votes[each]) == label
    return 100 * correct / len(val)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (500, 0.5)])
@pytest.mark.parametrize("block", [7, 10_000])
def test_nearest_neighbours_vote_as_in_a_double_loop(
    clouds: tuple[Tensor, ...], k: int, temperature: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "ROWS", block)
    monkeypatch.setattr(probes, "COLUMNS", block)
    train, train_labels, val, val_labels = clouds
    found = probes.knn_top1(train, train_labels, val, val_labels, k, temperature)
    assert found == _knn(train, train_labels, val, val_labels, k, temperature)
    assert 20 < found < 100


def test_nearest_neighbours_need_embeddings(clouds: tuple[Tensor, ...]) -> None:
    train, train_labels, val, val_labels = clouds
    with pytest.raises(ValueError, match="0 training and 70 validation"):
        probes.knn_top1(train[:0], train_labels[:0], val, val_labels)
