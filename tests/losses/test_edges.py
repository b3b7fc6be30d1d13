"""Forms of the edges beside the paper's, against loops over pairs of images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from irgdistill.config.loading import load_config
from irgdistill.graph import edge_loss
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import DistillLoss, build_loss
from irgdistill.matching.levels import Level, Tap
from irgdistill.matching.plan import Pair, Plan
from irgdistill.matching.taps import Output


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def level(network: str, k: int, width: int, side: int) -> Level:
    taps = tuple(Tap(f"{network}{k}.{i}", width, side, side, "NCHW") for i in range(2))
    return Level(k, taps[0], taps[-1], "block", taps)


PLAN = Plan(
    (Pair("/4", level("t", 2, 6, 8), level("s", 2, 4, 8)), Pair("/8", level("t", 3, 7, 8), level("s", 3, 5, 4)))
)


def outputs(images: int = 5) -> tuple[Output, Output]:
    """Grids of 8×8 and, of the student's second stage, 4×4 cells; their means are the pooled features."""

    def network(name: str, shapes: dict[str, tuple[int, int]], seed: int) -> Output:
        grids = {
            f"{name}{tap}": random(images, width, side, side, seed=seed + i).requires_grad_()
            for i, (tap, (width, side)) in enumerate(shapes.items())
        }
        return Output(random(images, 10), {tap: x.mean((2, 3)) for tap, x in grids.items()}, grids=grids)

    student = network("s", {"2.1": (4, 8), "3.0": (5, 4), "3.1": (5, 4)}, 10)
    return student, network("t", {"2.1": (6, 8), "3.1": (7, 8)}, 20)


def loss_of(**settings: object) -> DistillLoss:
    flags = {"method": "none", "losses.edges.weight": 1.0}
    return build_loss(
        load_config(flags={**flags, **{f"losses.edges.{k}": v for k, v in settings.items()}}).losses, PLAN
    )


def rows(vectors: Tensor, form: str) -> list[list[float]]:
    """Squared distances or cosines of each vector with the others, (B, D) -> B rows."""
    x, found = vectors.tolist(), []
    for i, a in enumerate(x):
        others = [b for j, b in enumerate(x) if j != i]
        if form == "pearson":
            found.append([math.dist(a, b) ** 2 for b in others])
        else:
            found.append(
                [sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) for b in others]
            )
    return found


def distance(a: list[float], b: list[float], form: str, temperature: float) -> float:
    if form == "pearson":
        return 1 - torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1].item()
    p, q = (torch.tensor(x, dtype=torch.float64).div(temperature).softmax(0) for x in (b, a))
    return (p * (p / q).log()).sum().item()


def expected(student: Tensor, teacher: Tensor, form: str, temperature: float = 0.1) -> float:
    pairs = zip(rows(student, form), rows(teacher, form), strict=True)
    found = [distance(a, b, form, temperature) for a, b in pairs]
    return sum(found) / len(found)


@pytest.mark.parametrize("form", ["pearson", "softmax"])
@pytest.mark.parametrize("stages", ["last", "all"])
def test_rows_of_pooled_features_by_hand(form: str, stages: str) -> None:
    student, teacher = outputs()
    loss = loss_of(form=form, stages=stages, temperature=0.4, blocks=2)
    found = loss(Batch(student, torch.arange(5), teacher))["edges"]
    pairs = [("s3.0", "t3.1"), ("s3.1", "t3.1"), *([("s2.1", "t2.1")] if stages == "all" else [])]
    each = [expected(student.features[s], teacher.features[t], form, 0.4) for s, t in pairs]
    assert found.item() == pytest.approx(sum(each) / len(each), rel=1e-9)
    assert loss.where("student")["grids"] == [] and len(loss.where("student")["taps"]) == len(pairs)


def at_positions(grid: Tensor) -> list[Tensor]:
    """(B, C, h, w) with h and w 4 or 8 -> the unit channel vectors (B, C) at each of 4×4 positions."""
    step = grid.shape[2] // 4
    cells = [
        grid[:, :, i : i + step, j : j + step].mean((2, 3))
        for i in range(0, 4 * step, step)
        for j in range(0, 4 * step, step)
    ]
    return [x / x.norm(dim=1, keepdim=True) for x in cells]


@pytest.mark.parametrize("form", ["paper", "pearson", "softmax"])
def test_edges_at_positions_by_hand(form: str) -> None:
    student, teacher = outputs()
    loss = loss_of(form=form, stages="all", grid=4)
    found = loss(Batch(student, torch.arange(5), teacher))["edges"]
    each = []
    for s, t in (("s2.1", "t2.1"), ("s3.1", "t3.1")):
        here, there = at_positions(student.grids[s]), at_positions(teacher.grids[t])
        assert len(here) == 16
        for a, b in zip(here, there, strict=True):
            each.append(edge_loss(a, b).item() if form == "paper" else expected(a, b, form))
    assert found.item() == pytest.approx(sum(each) / 32, rel=1e-9)
    found.backward()
    grid = student.grids["s2.1"]
    assert grid.grad is not None and (grid.grad != 0).any(1).all()
    assert loss.where("teacher")["taps"] == [] and len(loss.where("teacher")["grids"]) == 2


def test_what_edges_compare_follows_their_settings() -> None:
    for settings, kinds in (([], {"features"}), (["losses.edges.grid=4"], {"grids"})):
        losses = load_config(settings=settings, flags={"method": "irg"}).losses
        assert losses.compares("edges") == kinds
        assert losses.comparing("grids") == (["edges"] if kinds == {"grids"} else [])


def test_transformations_over_views_by_hand() -> None:
    """Three images with two views each, at the end of both stages."""
    student, teacher = outputs(6)
    flags = {"method": "none", "losses.transform.weight": 1.0, "losses.transform.over": "views"}
    losses = load_config(flags=flags).losses
    assert losses.compares("transform") == {"features", "views"}
    loss = build_loss(losses, PLAN)
    assert [tap.module for tap in loss.where("student")["taps"]] == ["s2.1", "s3.1"]
    found = loss(Batch(student, torch.arange(6), teacher))["transform"]
    total = 0.0
    for k in (2, 3):
        both = []
        for x in (student.features[f"s{k}.1"].tolist(), teacher.features[f"t{k}.1"].tolist()):
            moves = [math.dist(x[i], x[3 + i]) ** 2 for i in range(3)]
            both.append([move / max(moves) for move in moves])
        total += sum((a - b) ** 2 for a, b in zip(*both, strict=True)) / 3 / 2
    assert found.item() == pytest.approx(total, rel=1e-9)


def test_two_images_or_equal_ones_have_no_rows_to_compare() -> None:
    """Two images: one distance each. Equal images: every distance is zero."""
    for images in (1, 2, 4):
        student, teacher = outputs(images)
        for x in student.features.values():
            x.data.copy_(x.data[:1].expand_as(x) if images == 4 else x.data)
        for form in ("pearson", "softmax"):
            value = loss_of(form=form)(Batch(student, torch.zeros(images).long(), teacher))["edges"]
            (gradient,) = torch.autograd.grad(value, student.grids["s3.1"])
            assert value.isfinite() and gradient.isfinite().all()
            if images < 4 or form == "pearson":
                assert value == 0 and (gradient == 0).all()
