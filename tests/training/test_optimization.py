"""Schedules, update by update, against their formulas; groups of parameters, against timm's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from irgdistill.config.schema import OptimConfig, ScheduleConfig
from irgdistill.errors import UserError
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


def test_layer_decay_gives_the_rates_of_timm_and_adapters_the_full_one() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=16, num_heads=2, patch_size=8, img_size=16)
    adapters, schedule = network(), ScheduleConfig(epochs=4, name="cosine", warmup_epochs=1, warmup_lr=0.1)
    config = OptimConfig(name="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5, betas=(0.8, 0.9))
    optimizer = build_optimizer(model, config, adapters)
    scheduler = build_scheduler(optimizer, schedule, updates_per_epoch=3)
    skipped = model.no_weight_decay()
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5, no_weight_decay_list=skipped)
    expected = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected |= {id(p): (1.0, 0.05 if p.ndim > 1 else 0.0) for p in adapters.parameters()}
    for update, peak in ((0, 0.1), (3, 0.5 * (1 + math.cos(math.pi / 4)))):
        scheduler.step_update(update)
        found = {id(p): (g["lr"] / peak, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert found.keys() == expected.keys()
        assert all(found[key] == pytest.approx(values, rel=1e-6) for key, values in expected.items()), update
    assert len({rate for rate, _ in expected.values()}) == 5, "embedding, three blocks, head"
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "betas", "message"),
    [("sgd", (0.9, 0.99), "sgd has none"), ("adamw", (0.9, 0.99, 0.9), "gives 3 betas, and adamw has 2")],
)
def test_betas_that_an_optimizer_does_not_have_are_refused(name: str, betas: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(network(), OptimConfig(name=name, lr=0.1, betas=betas))
