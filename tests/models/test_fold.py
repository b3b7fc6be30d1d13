"""Folded batch norms: the same network to rounding, faster; or left alone."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from irgdistill.matching.taps import Tapped
from irgdistill.models.build import build_network
from irgdistill.models.fold import fold_batch_norm


def trained(model: nn.Module) -> nn.Module:
    """Batch norms that do something, as those of a trained network."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "size", "left"),
    [
        ("cifar_resnet20", 32, 0),
        ("resnet18", 64, 0),
        ("mobilenetv2_100", 64, 1),  # norm and activation in one module; the last one is tapped
        ("tf_efficientnet_b0", 64, 1),  # padding as TensorFlow's
        ("densenet121", 64, 62),  # most norms come before their convolution
        ("vit_tiny_patch16_224", 224, 0),  # no batch norm
        ("resnetv2_50", 64, 17),  # the first norm of a block comes before its convolutions
    ],
)
def test_logits_and_taps_stay(name: str, size: int, left: int) -> None:
    network = build_network(name, num_classes=5, input_size=(size, size))
    model = trained(network.model)
    taps = [tap for level in network.levels() for tap in (level.entry, level.exit) if tap is not None]
    images = torch.randint(0, 255, (3, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with torch.no_grad():
        before = Tapped(model, network.preprocess(), taps)
        expected = before(images)
        before.release()
        folded = fold_batch_norm(model, (size, size), {tap.module for tap in taps})
        found = Tapped(model, network.preprocess(), taps)(images)
    remaining = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert folded == norms - remaining and remaining == left
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for tap, value in expected.features.items():
        torch.testing.assert_close(found.features[tap], value, rtol=1e-4, atol=1e-4)


class Odd(nn.Module):
    """One convolution shared, one whose output goes two ways."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.norm(x)
        return self.head((self.norm(self.conv(y)) if self.shared else x + y).mean((2, 3)))


@pytest.mark.parametrize("shared", [True, False])
def test_what_cannot_be_folded_is_left_alone(shared: bool) -> None:
    model = trained(Odd(shared))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model(images)
        assert fold_batch_norm(model, (8, 8)) == 0
        assert torch.equal(model(images), before) and isinstance(model.norm, nn.BatchNorm2d)


def test_tapped_modules_and_networks_in_training_are_left_alone() -> None:
    model = trained(timm.create_model("cifar_resnet20"))
    assert fold_batch_norm(model, (32, 32), {"conv1"}) == 18
    assert isinstance(model.bn1, nn.BatchNorm2d)
    assert fold_batch_norm(timm.create_model("cifar_resnet20").train(), (32, 32)) == 0
