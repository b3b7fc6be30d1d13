"""Relations between the positions of an image, against loops over its pairs of positions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from irgdistill.config.loading import load_config
from irgdistill.errors import UserError
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss
from irgdistill.matching.levels import Level, Tap
from irgdistill.matching.plan import Pair, Plan
from irgdistill.matching.taps import Output


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def level(network: str, k: int, width: int, side: int, layout: str = "NCHW") -> Level:
    tap = Tap(f"{network}{k}", width, side, side, layout)
    return Level(k, tap, tap, "block", (tap,))


PLAN = Plan(
    (
        Pair("/4", level("t", 2, 6, 8), level("s", 2, 4, 8)),
        Pair("/8", level("t", 3, 7, 4), level("s", 3, 5, 2)),
    )
)


def outputs() -> tuple[Output, Output]:
    """Grids of two stages; the second stage's differ in size."""

    def network(name: str, *shapes: tuple[int, int, int]) -> Output:
        grids = {
            f"{name}{k}": random(3, *shape, seed=len(name + str(k)) + shape[0]) for k, shape in enumerate(shapes, 2)
        }
        return Output(random(3, 10), {}, grids={name: x.requires_grad_() for name, x in grids.items()})

    return network("s", (4, 3, 2), (5, 2, 2)), network("t", (6, 3, 2), (7, 4, 4))


def cosine_rows(grid: Tensor) -> Iterator[list[float]]:
    """The cosines of each position with the others of its image."""
    for image in grid.detach().flatten(2).transpose(1, 2).tolist():
        for i, a in enumerate(image):
            others = [b for j, b in enumerate(image) if j != i]
            yield [sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) for b in others]


def one_minus_correlation(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    a, b = [x - mean_a for x in a], [x - mean_b for x in b]
    return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def divergence(student: list[float], teacher: list[float], temperature: float) -> float:
    p, q = ([math.exp(x / temperature) for x in row] for row in (teacher, student))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("form", ["pearson", "softmax"])
def test_rows_of_cosines_by_hand(form: str) -> None:
    student, teacher = outputs()
    settings = [f"losses.positions.form={form}", "losses.positions.temperature=0.3"]
    loss = build_loss(load_config(settings=settings, flags={"method": "positions"}).losses, PLAN)
    assert {kind: bool(taps) for kind, taps in loss.where("teacher").items()} == {
        "taps": False,
        "maps": False,
        "energies": False,
        "grids": True,
    }
    found = loss(Batch(student, torch.arange(3), teacher))
    expected = 0.0
    for stage, (s, t) in enumerate([("s2", "t2"), ("s3", "t3")]):
        there = teacher.grids[t].unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)) if stage else teacher.grids[t]
        rows = list(zip(cosine_rows(student.grids[s]), cosine_rows(there), strict=True))
        assert len(rows) == 3 * (4 if stage else 6)
        both = [one_minus_correlation(*row) if form == "pearson" else divergence(*row, 0.3) for row in rows]
        expected += sum(both) / len(both) / 2
    assert list(found) == ["ce", "positions"] and found["positions"].item() == pytest.approx(expected, rel=1e-10)
    found["positions"].backward()
    assert all(grid.grad is not None and grid.grad.abs().sum() > 0 for grid in student.grids.values())


@pytest.mark.parametrize("form", ["pearson", "softmax"])
@pytest.mark.parametrize("kind", ["one position", "two positions", "flat", "flat teacher", "zero", "half"])
def test_degenerate_maps_teach_nothing(form: str, kind: str) -> None:
    grids = [random(3, 4, 4, 4, seed=seed) for seed in (0, 1)]
    if "position" in kind:
        grids = [x[:, :, :1, : 1 if kind.startswith("one") else 2] for x in grids]
    if kind.startswith("flat"):
        index = ["flat", "flat teacher"].index(kind)
        grids[index] = (grids[index][:, :, :1, :1] * (1 + 1e-7 * grids[index])).expand(3, 4, 4, 4)
    if kind == "zero":
        grids[0] = torch.zeros_like(grids[0])
    if kind == "half":
        grids = [x.bfloat16() for x in grids]
    student, teacher = grids[0].clone().requires_grad_(), grids[1]
    one_stage = Plan(PLAN.pairs[:1])
    loss = build_loss(
        load_config(settings=[f"losses.positions.form={form}"], flags={"method": "positions"}).losses, one_stage
    )
    batch = Batch(
        Output(random(3, 10), {}, grids={"s2": student}),
        torch.arange(3),
        Output(random(3, 10), {}, grids={"t2": teacher}),
    )
    value = loss(batch)["positions"]
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e3
    assert value.dtype == (torch.float32 if kind == "half" else torch.float64)
    if "position" in kind:
        assert value == 0 and (student.grad == 0).all()
    if form == "pearson" and kind in ("flat", "flat teacher", "zero"):
        assert value == 0 and (student.grad == 0).all()


def test_networks_without_maps_are_refused_or_left_out() -> None:
    tiles = Plan((Pair("/4", level("t", 2, 6, 8, "BTNC"), level("s", 2, 4, 8)),))
    with pytest.raises(UserError, match="positions compares feature maps, and no matched stage has one"):
        build_loss(load_config(flags={"method": "positions"}).losses, tiles)
    beside = load_config(settings=["losses.positions.weight=15"], flags={"method": "irg"}).losses
    loss = build_loss(beside, tiles)
    assert list(loss.terms) == ["ce", "logits", "edges"] and loss.notes[0].startswith("no positions term")
