"""Networks of torchvision have the levels of timm's, block by block: matching reads the data flow, not names."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

from irgdistill.matching.levels import Level, Tap
from irgdistill.models import Network, build_network

SAME = {"resnet18": "resnet18", "resnet50": "resnet50", "densenet121": "densenet121"}
"""torchvision -> timm, with the same names of modules."""
ALIKE = {
    "convnext_tiny": "convnext_tiny",
    "swin_t": "swin_tiny_patch4_window7_224",
    "vit_b_16": "vit_base_patch16_224",
    "shufflenet_v2_x0_5": None,
    "googlenet": None,
}


def levels(name: str) -> list[Level]:
    with torch.device("meta"):
        model = models.get_model(name, **({"init_weights": False} if name == "googlenet" else {}))
    network = Network.of(model)
    assert (network.name, network.num_classes) == (type(model).__name__, 1000)
    return network.levels()


def shape(tap: Tap | None) -> tuple[object, ...] | None:
    return None if tap is None else (tap.channels, tap.height, tap.width, tap.layout, tap.prefix)


@pytest.mark.parametrize("name", SAME)
def test_the_same_network_has_the_same_levels(name: str) -> None:
    assert levels(name) == build_network(SAME[name], meta=True).levels()


@pytest.mark.parametrize("name", ALIKE)
def test_blocks_are_those_of_timm_under_other_names(name: str) -> None:
    found, alike = levels(name), ALIKE[name]
    assert [level.level for level in found] == sorted({level.level for level in found})
    if alike is not None:
        known = build_network(alike, meta=True).levels()
        for own, timms in zip(found, known, strict=True):
            assert (own.level, own.kind, shape(own.entry)) == (timms.level, timms.kind, shape(timms.entry))
            assert [*map(shape, own.blocks)] == [*map(shape, timms.blocks)]
