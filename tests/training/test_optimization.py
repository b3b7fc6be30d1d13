"""Learning rates of every schedule, update by update, against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from irgdistill.config.schema import OptimConfig, ScheduleConfig
from irgdistill.training.optimization import build_optimizer, build_scheduler

EPOCHS, UPDATES = 10, 7
EARLY = 1.5 / EPOCHS / UPDATES
"""timm's multistep decays one update before the milestone's epoch begins."""


def tanh(t: float) -> float:
    return 0.5 * (1 - math.tanh(-7 * (1 - t) + 3 * t))


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"name": "cosine"}, lambda t: 0.5 * (1 + math.cos(math.pi * t))),
        ({"name": "cosine", "min_lr": 0.2}, lambda t: 0.2 + 0.4 * (1 + math.cos(math.pi * t))),
        (
            {"name": "multistep", "milestones": [4, 8], "decay_rate": 0.5},
            lambda t: 0.5 ** sum(t > m - EARLY for m in (0.4, 0.8)),
        ),
        ({"name": "step", "decay_epochs": 3}, lambda t: 0.1 ** int(t * EPOCHS / 3 + 1e-9)),
        ({"name": "poly", "decay_rate": 2}, lambda t: (1 - t) ** 2),
        ({"name": "tanh"}, tanh),
        ({"name": "none"}, lambda t: 1.0),
        (
            {"name": "none", "warmup_epochs": 2, "warmup_lr": 0.1},
            lambda t: 0.1 + 0.9 * t * EPOCHS / 2 if t < 0.2 else 1.0,
        ),
    ],
)
def test_schedules(options: dict[str, Any], rate: Callable[[float], float]) -> None:
    """`rate(t)`: after the share t of the training, of a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build_scheduler(optimizer, ScheduleConfig(epochs=EPOCHS, **options), UPDATES)
    for update in range(EPOCHS * UPDATES):
        scheduler.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(update / EPOCHS / UPDATES), abs=1e-9), update


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))


@pytest.mark.parametrize("decay_all", [False, True])
def test_weight_decay_spares_biases_and_norms_unless_told(decay_all: bool) -> None:
    model, adapters = network(), network()
    config = OptimConfig(name="momentum", weight_decay=0.1, decay_all=decay_all)
    optimizer = build_optimizer(model, config, adapters)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    every = [*model.parameters(), *adapters.parameters()]
    weights = [module[0].weight for module in (model, adapters)]
    assert decayed == {id(p) for p in (every if decay_all else weights)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(every)


@pytest.mark.parametrize(("name", "nesterov"), [("sgd", True), ("momentum", False)])
def test_momentum_is_sgd_without_nesterov(name: str, nesterov: bool) -> None:
    """Two steps with gradient 1: v = 1, then 0.9 + 1; Nesterov adds 0.9 v to each gradient in place of v."""
    model = torch.nn.Linear(1, 1, bias=False)
    start = model.weight.item()
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.0))
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    moved = [1 + 0.9 * 1, 1 + 0.9 * 1.9] if nesterov else [1, 1.9]
    assert model.weight.item() == pytest.approx(start - 0.1 * sum(moved), rel=1e-5)
