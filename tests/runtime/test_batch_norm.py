"""Running statistics of short epochs."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from irgdistill.config import load_config
from irgdistill.io import Report
from irgdistill.runtime import World, renew_statistics
from irgdistill.training import build_components, prepare


@pytest.mark.parametrize(("batches", "momentum"), [(3, 0.5), (20, 0.25), (50, 0.1), (5000, 0.1)])
def test_momentum_rises_for_short_epochs_only(batches: int, momentum: float) -> None:
    network = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1, momentum=None))
    renew_statistics(network, batches)
    assert [module.momentum for module in network] == [momentum, None]


def test_an_epoch_renews_the_statistics() -> None:
    network = timm.create_model("efficientnet_lite0", num_classes=2, drop_rate=0.0)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.running_mean.fill_(1e6)
    renew_statistics(network, 12)
    with torch.no_grad():
        for _ in range(12):
            network(torch.randn(4, 3, 32, 32))
    assert all(module.running_mean.abs().max() < 1e4 for module in norms)


def test_a_run_sets_the_momentum_of_its_student() -> None:
    student = {"method": "none", "student.name": "cifar_resnet14_x0_5", "runtime.device": "cpu"}
    report = Report(quiet=True)
    run = build_components(prepare(load_config("quickstart", flags=student), report), World(), report)
    norms = [module for module in run.student.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert run.batches == 14 and {module.momentum for module in norms} == {5 / 14}
