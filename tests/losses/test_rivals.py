"""Later methods than the paper's rivals: each against its formula written out with numpy or as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from irgdistill.config.loading import load_config
from irgdistill.losses.adapters import Learner
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import DistillLoss, build_loss
from irgdistill.losses.queue import Queue
from irgdistill.matching.levels import Level, Tap
from irgdistill.matching.plan import Pair, Plan
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


# --- terms with networks of their own ---------------------------------------------------------------------------------


def level(network: str, k: int, width: int, side: int) -> Level:
    tap = Tap(f"{network}{k}", width, side, side, "NCHW")
    return Level(k, tap, tap, "block", (tap,))


PLAN = Plan(
    (Pair("/4", level("t", 2, 6, 8), level("s", 2, 4, 8)), Pair("/8", level("t", 3, 7, 2), level("s", 3, 5, 4)))
)


def outputs(images: int = 5, seed: int = 0) -> tuple[Output, Output]:
    def network(name: str, *shapes: tuple[int, int], seed: int) -> Output:
        maps = {f"{name}{k}": random(images, c, side, side, seed=seed + k) for k, (c, side) in enumerate(shapes, 2)}
        return Output(random(images, 4, seed=seed), {name: x.mean((2, 3)) for name, x in maps.items()}, maps)

    return network("s", (4, 8), (5, 4), seed=seed), network("t", (6, 8), (7, 2), seed=seed + 50)


def learned(term: str, *settings: str) -> tuple[DistillLoss, Learner]:
    """The loss of a term, and its adapters in float64 behind a student that is an `Output` already."""
    torch.manual_seed(0)
    losses = load_config(settings=[f"losses.{term}.weight=1", *settings], flags={"method": "none"}).losses
    loss = build_loss(losses, PLAN)
    return loss, Learner(torch.nn.Identity(), loss.adapters().double())


def test_projected_features_by_hand() -> None:
    student, teacher = outputs()
    loss, learner = learned("srd")
    layer = loss.adapters()["srd"].layer
    x = student.features["s3"].numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    z = [(v - v.mean(0)) / np.sqrt(v.var(0) + 1e-4) for v in (x, teacher.features["t3"].numpy())]
    found = loss(Batch(learner(student), LABELS, teacher))["srd"]
    assert found.item() == pytest.approx(np.log(np.mean((z[0] - z[1]) ** 4)), rel=1e-10)
    one = loss(Batch(learner(outputs(1)[0]), LABELS[:1], outputs(1)[1]))["srd"]
    assert one.isfinite()


def test_a_queue_keeps_the_latest_rows() -> None:
    queue = Queue(5, x=torch.zeros(1), label=torch.tensor(-1))
    queue.add(x=torch.tensor([[1.0], [2.0], [3.0]]), label=torch.tensor([1, 2, 3]))
    assert queue.get_buffer("label").tolist() == [1, 2, 3, -1, -1]
    queue.add(x=torch.tensor([[4.0], [5.0], [6.0]]), label=torch.tensor([4, 5, 6]))
    assert queue.get_buffer("label").tolist() == [6, 2, 3, 4, 5] and queue.get_buffer("x")[:, 0].tolist() == [
        6,
        2,
        3,
        4,
        5,
    ]
    queue.add(x=torch.arange(7.0)[:, None], label=torch.arange(7))
    assert sorted(queue.get_buffer("label").tolist()) == [2, 3, 4, 5, 6]
    queue.eval().add(x=torch.zeros(1, 1), label=torch.tensor([9]))
    assert 9 not in queue.get_buffer("label")
    other = Queue(5, x=torch.zeros(1), label=torch.tensor(-1))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.start, queue.start) and torch.equal(other.get_buffer("x"), queue.get_buffer("x"))


def test_contrast_by_hand() -> None:
    """Two steps: at the second, the images of the first are the negatives of those of other classes."""
    loss, learner = learned("crd", "losses.crd.negatives=8", "losses.crd.width=3", "losses.crd.temperature=0.5")
    layers = loss.adapters()["crd"]

    def embedded(output: Output, name: str, layer: torch.nn.Linear) -> np.ndarray:
        x = output.features[name].numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    first, second = outputs(), outputs(seed=100)
    assert loss(Batch(learner(first[0]), LABELS, first[1]))["crd"] == 0
    labels = torch.tensor([1, 1, 3, 0, 0])
    found = loss(Batch(learner(second[0]), labels, second[1]))["crd"]
    s, old_s = (embedded(pair[0], "s3", layers.student) for pair in (second, first))
    t, old_t = (embedded(pair[1], "t3", layers.teacher) for pair in (second, first))
    old_t, old_s = old_t.astype(np.float32), old_s.astype(np.float32)
    total = 0.0
    for anchors, positives, negatives in ((s, t, old_t), (t, s, old_s)):
        for i in range(5):
            others = [negatives[j] for j in range(5) if LABELS[j] != labels[i]]
            mean = sum(math.exp(anchors[i] @ other / 0.5) for other in others) / len(others)
            h = [math.exp(anchors[i] @ x / 0.5) / mean for x in (positives[i], *others)]
            h = [r / (r + len(others)) for r in h]
            total -= (math.log(h[0]) + sum(math.log(1 - x) for x in h[1:])) / 5
    assert found.item() == pytest.approx(total, rel=1e-6)
    found.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.adapters.parameters())


def test_knowledge_review_by_hand() -> None:
    student, teacher = outputs()
    loss, learner = learned("reviewkd")
    mean, deep, shallow = loss.adapters()["reviewkd"].fusions

    def convolved(x: Tensor, part: torch.nn.Sequential) -> Tensor:
        x = torch.nn.functional.conv2d(x, part[0].weight, padding=part[0].padding)
        return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    def fused(x: Tensor, deeper: Tensor, fusion: torch.nn.Module) -> Tensor:
        x, deeper = convolved(x, fusion.reduce), deeper.repeat_interleave(x.shape[2] // deeper.shape[2], 2)
        deeper = deeper.repeat_interleave(x.shape[3] // deeper.shape[3], 3)
        joined, layer = torch.cat([x, deeper], 1), fusion.attention[0]
        weights = (
            torch.einsum("bchw,oc->bohw", joined, layer.weight[:, :, 0, 0]) + layer.bias[:, None, None]
        ).sigmoid()
        return x * weights[:, 0:1] + deeper * weights[:, 1:2]

    def compared(a: Tensor, b: Tensor, sides: list[int]) -> float:
        total, factors = ((a - b) ** 2).mean().item(), 1.0
        for power, side in enumerate(sides, 1):
            cells = [x.unflatten(3, (side, -1)).unflatten(2, (side, -1)).mean((3, 5)) for x in (a, b)]
            total, factors = total + 0.5**power * ((cells[0] - cells[1]) ** 2).mean().item(), factors + 0.5**power
        return total / factors

    s, t = student.maps, teacher.maps
    lowest = convolved(s["s3"].mean((2, 3), keepdim=True), mean.reduce)
    middle = fused(s["s3"], lowest, deep)
    upper = fused(s["s2"], middle, shallow)
    halved = convolved(middle, deep.expand).unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    parts = [
        compared(convolved(lowest, mean.expand), t["t3"].mean((2, 3), keepdim=True), []),
        compared(halved, t["t3"], [1]),
        compared(convolved(upper, shallow.expand), t["t2"], [4, 2, 1]),
    ]
    found = loss(Batch(learner(student), LABELS, teacher))["reviewkd"]
    assert found.item() == pytest.approx(sum(parts) / 3, rel=1e-9)
    assert loss.rises["reviewkd"] == (0, 0.0833)
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.adapters.parameters())


# --- two views --------------------------------------------------------------------------------------------------------


def direction(a: Tensor, b: Tensor) -> np.ndarray:
    difference = (a - b).detach().numpy()
    return difference / np.linalg.norm(difference)


def huber(a: np.ndarray, b: np.ndarray) -> float:
    difference = np.abs(a - b)
    return float(np.where(difference <= 1, difference**2, 2 * difference - 1).sum())


def test_virtual_relations_by_hand() -> None:
    """Three images with two views each, four classes."""
    student, teacher = random(6, 4).requires_grad_(), 2 * random(6, 4, seed=1)
    sure = probabilities(teacher, 1.0).max(1) >= 0.6
    assert 0 < sure[:3].sum() * sure[3:].sum() < 9
    images = sum(
        huber(direction(student[i], student[3 + j]), direction(teacher[i], teacher[3 + j])) * (sure[i] and sure[3 + j])
        for i in range(3)
        for j in range(3)
    )
    classes = sum(
        huber(
            direction(student[:3, k], student[3:, m]),
            direction(teacher[:3, k], teacher[3:, m]),
        )
        for k in range(4)
        for m in range(4)
    )
    settings = ("losses.vrm.classes=0.5", "losses.vrm.confidence=0.6")
    losses = load_config(settings=["losses.vrm.weight=1", *settings], flags={"method": "none"}).losses
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    found = build_loss(losses, None)(Batch(Output(student, {}), labels, Output(teacher, {})))["vrm"]
    assert found.item() == pytest.approx(images / 9 + 0.5 * classes / 16, rel=1e-9)
    found.backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_cross_view_targets_by_hand() -> None:
    student, teacher, labels = random(6, 4), 2 * random(6, 4, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    most = probabilities(teacher, 1.0).max(1)
    p, q = probabilities(teacher, 3.0), probabilities(student, 3.0)

    def divergence(i: int, j: int) -> float:
        return 9 * sum(p[j, k] * math.log(p[j, k] / q[i, k]) for k in range(4))

    total = 0.0
    for i in range(3):
        total += (divergence(i, i) + divergence(i + 3, i + 3)) / 6 * (most[i] >= 0.6)
        total += 0.5 * (divergence(i, i + 3) + divergence(i + 3, i)) / 6 * (most[i + 3] >= 0.55)
    assert 0 < (most[:3] >= 0.6).sum() < 3 or 0 < (most[3:] >= 0.55).sum() < 3
    settings = ["losses.crld.weight=1", "losses.crld.cross=0.5", "losses.crld.temperature=3"]
    settings += ["losses.crld.confidence=0.6", "losses.crld.confidence_across=0.55"]
    losses = load_config(settings=settings, flags={"method": "none"}).losses
    found = build_loss(losses, None)(Batch(Output(student, {}), labels, Output(teacher, {})))["crld"]
    assert found.item() == pytest.approx(total, rel=1e-10)
