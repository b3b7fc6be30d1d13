"""Later methods than the paper's rivals: each against its formula written out with numpy or as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from irgdistill.config.loading import load_config
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss
from irgdistill.matching.taps import Output


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 3, 1, 1, 2])


def value_of(term: str, *settings: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The raw value of a term on logits."""
    losses = load_config(settings=[f"losses.{term}.weight=1", *settings], flags={"method": "none"}).losses
    return build_loss(losses, None)(Batch(Output(student, {}), LABELS[: len(student)], Output(teacher, {})))[term]


def probabilities(logits: Tensor, temperature: float) -> np.ndarray:
    exponents = np.exp(logits.detach().numpy() / temperature)
    return exponents / exponents.sum(1, keepdims=True)


def test_dist_by_hand() -> None:
    student, teacher = random(5, 4).requires_grad_(), 2 * random(5, 4, seed=1)
    p, q = probabilities(teacher, 3.0), probabilities(student, 3.0)
    rows = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(5)])
    columns = np.mean([1 - np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(4)])
    settings = ("losses.dist.temperature=3", "losses.dist.inter=0.5", "losses.dist.intra=2")
    found = value_of("dist", *settings, student=student, teacher=teacher)
    assert found.item() == pytest.approx(9 * (0.5 * rows + 2 * columns), rel=1e-10)
    found.backward()
    assert student.grad is not None and student.grad.abs().min() > 0


def test_transformed_targets_by_hand() -> None:
    student, teacher, total, plain = random(5, 4), 2 * random(5, 4, seed=1), 0.0, 0.0
    p, q = probabilities(teacher, 1.0), probabilities(student, 1.0)
    for i in range(5):
        powers = [float(p[i, k]) ** 0.3 for k in range(4)]
        divergence = sum(a / sum(powers) * math.log(a / sum(powers) / q[i, k]) for k, a in enumerate(powers))
        total, plain = total + sum(powers) * divergence / 5, plain + divergence / 5
    both = {"student": student, "teacher": teacher}
    assert value_of("wttm", "losses.wttm.gamma=0.3", **both).item() == pytest.approx(total, rel=1e-10)
    unweighted = value_of("wttm", "losses.wttm.gamma=0.3", "losses.wttm.weighted=false", **both)
    assert unweighted.item() == pytest.approx(plain, rel=1e-10)


@pytest.mark.parametrize("term", ["kd", "dkd"])
def test_standardized_logits_are_those_of_zero_mean_and_unit_deviation(term: str) -> None:
    student, teacher = 3 * random(5, 4) + 7, random(5, 4, seed=1)
    z = [torch.from_numpy((x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-7))
         for x in (student.numpy(), teacher.numpy())]  # fmt: skip
    found = value_of(term, f"losses.{term}.standardize=true", student=student, teacher=teacher)
    expected = value_of(term, student=z[0], teacher=z[1])
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    shifted = value_of(term, f"losses.{term}.standardize=true", student=2 * student - 5, teacher=teacher)
    assert shifted.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.item() != pytest.approx(value_of(term, student=student, teacher=teacher).item(), rel=1e-3)


def test_standardized_logits_need_every_logit_of_a_cache() -> None:
    losses = load_config(settings=["losses.kd.standardize=true"], flags={"method": "kd"}).losses
    assert losses.needing_all_logits() == ["kd"]
    assert load_config(flags={"method": "kd"}).losses.needing_all_logits() == []


def test_a_weight_rises_between_two_shares_of_the_training() -> None:
    settings = ["losses.dkd.weight=2", "losses.dkd.rise=0.2,0.6", "losses.dkd.fade=0.8,1"]
    loss = build_loss(load_config(settings=settings, flags={"method": "dkd"}).losses, None)
    found = [loss.weights(progress).get("dkd") for progress in (0, 0.2, 0.3, 0.5, 0.6, 0.8, 0.9, 1)]
    assert found == pytest.approx([0, 0, 0.5, 1.5, 2, 2, 1, None])


@pytest.mark.parametrize("kind", ["one image", "equal", "half"])
@pytest.mark.parametrize("term", ["dist", "wttm"])
def test_finite_values_and_gradients(term: str, kind: str) -> None:
    student, teacher = random(5, 4), random(5, 4, seed=1)
    if kind == "one image":
        student, teacher = student[:1], teacher[:1]
    if kind == "equal":
        student = student[:1].repeat(5, 1)
    if kind == "half":
        student, teacher = student.bfloat16(), teacher.bfloat16()
    student.requires_grad_()
    value = value_of(term, student=student, teacher=teacher)
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()
    assert value.dtype == (torch.float32 if kind == "half" else torch.float64)
