"""Probes against the same formulas written as loops."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
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


@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_the_linear_classifier_is_the_one_that_another_solver_finds(
    clouds: tuple[Tensor, ...], strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks, against scipy's L-BFGS-B in float64 on all rows."""
    monkeypatch.setattr(probes, "COLUMNS", 32)
    x, labels = clouds[0], clouds[1]
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).double()

    def objective(values: object) -> tuple[float, object]:
        weights = torch.tensor(values).view(5, 9).requires_grad_()
        loss = F.cross_entropy(standard @ weights[:, :8].T + weights[:, 8], labels)
        loss = loss + strength / 2 * weights[:, :8].square().sum()
        loss.backward()
        assert weights.grad is not None
        return loss.item(), weights.grad.flatten().numpy()

    wanted = minimize(objective, torch.zeros(45).double().numpy(), jac=True, method="L-BFGS-B", tol=1e-12)
    classifier = probes.LinearClassifier(x, labels, 5)
    classifier.fit(strength)
    expected = torch.tensor(wanted.x).view(5, 9)
    assert torch.allclose(classifier.weight.double(), expected[:, :8], atol=1e-2)
    standard = ((clouds[2] - x.mean(0)) / x.std(0, correction=0)).double()
    answers = (standard @ expected[:, :8].T + expected[:, 8]).argmax(1)
    correct = 100 * (answers == clouds[3]).double().mean()
    assert classifier.top1(clouds[2], clouds[3]) == pytest.approx(float(correct))


def test_a_linear_probe_chooses_its_penalty() -> None:
    """Of 60 directions that tell nothing, a classifier without a penalty learns the noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (500,), generator=generator)
    x = torch.randn(5, 8, generator=generator)[labels] + 1.5 * torch.randn(500, 8, generator=generator)
    x = torch.cat([x, torch.randn(500, 60, generator=generator)], 1)
    scores = []
    for strength in probes.STRENGTHS:
        classifier = probes.LinearClassifier(x[:120], labels[:120], 5)
        classifier.fit(strength)
        scores.append(classifier.top1(x[120:], labels[120:]))
    found = probes.linear_top1(x[:120], labels[:120], x[120:], labels[120:])
    assert max(scores) - 2 < found and scores[-1] + 3 < found
    with pytest.raises(ValueError, match="4 training"):
        probes.linear_top1(x[:4], labels[:4], x, labels)
