"""Taps change nothing, keep only pooled vectors, and leave nothing behind."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from irgdistill.matching.levels import Tap, find_levels
from irgdistill.matching.taps import Tapped, tap_name
from irgdistill.models.network import Preprocess

SIZE = (32, 32)


def build(name: str, **kwargs: object) -> tuple[nn.Module, list[Tap]]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **kwargs)
    levels = find_levels(model, (3, 64, 64) if not name.startswith("cifar") else (3, 32, 32))
    return model, [tap for level in levels for tap in level.blocks]


def view(size: tuple[int, int] = SIZE) -> Preprocess:
    return Preprocess(size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_shufflenet_x0_5", "resnet18", "mobilenetv3_small_050"])
def test_logits_and_keys_are_those_of_the_untapped_model(name: str) -> None:
    model, taps = build(name)
    keys = list(model.state_dict())
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    plain = model.eval()(view((64, 64))(images))
    tapped = Tapped(model, view((64, 64)), taps).eval()
    output = tapped(images)
    assert torch.equal(output.logits, plain)
    assert list(output.features) == [tap_name(tap) for tap in taps]
    for tap in taps:
        pooled = output.features[tap_name(tap)]
        assert pooled.shape == (3, tap.channels) and pooled.dtype == torch.float32
    assert list(tapped.model.state_dict()) == keys
    released = tapped.release()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in released.modules())


def test_pooling_is_the_spatial_mean() -> None:
    model, taps = build("cifar_resnet20")
    seen = {}
    model.layer3[-1].register_forward_hook(lambda _module, _args, output: seen.update(map=output))
    output = Tapped(model, view(), taps).eval()(torch.randint(0, 256, (4, 3, 32, 32)))
    torch.testing.assert_close(output.features["layer3.2"], seen["map"].mean((2, 3)))


def test_gradient_flows_through_the_taps_under_autocast() -> None:
    model, taps = build("cifar_resnet14_x0_5")
    tapped = Tapped(model, view(), taps).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tapped(torch.randint(0, 256, (4, 3, 32, 32)))
    pooled = output.features["layer3.1"]
    assert pooled.dtype == torch.float32
    pooled.square().sum().backward()
    assert model.conv1.weight.grad is not None and model.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18"])
def test_gradient_checkpointing_gives_the_same_features_and_gradient(name: str) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32))
    results = []
    for enable in (False, True):
        model, taps = build(name)
        model.set_grad_checkpointing(enable)
        output = Tapped(model, view(), taps).train()(images)
        (output.logits.sum() + sum(value.square().sum() for value in output.features.values())).backward()
        results.append((output.features, next(model.parameters()).grad))
    (plain, gradient), (checkpointed, other) = results
    assert plain.keys() == checkpointed.keys()
    for key in plain:
        torch.testing.assert_close(plain[key], checkpointed[key])
    torch.testing.assert_close(gradient, other)


def test_each_network_normalises_and_resizes_for_itself() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    same = view()(images)
    expected = (images.float() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    torch.testing.assert_close(same, expected, atol=1e-5, rtol=1e-5)
    assert view((48, 24))(images).shape == (2, 3, 48, 24)
    grey = torch.full((1, 3, 20, 20), 128, dtype=torch.uint8)
    torch.testing.assert_close(view((32, 32))(grey).mean((2, 3)), view((20, 20))(grey).mean((2, 3)), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_compiled_networks_keep_their_taps() -> None:
    model, taps = build("cifar_resnet14_x0_5")
    tapped = Tapped(model, view(), taps).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32))
    plain = tapped(images)
    compiled = torch.compile(tapped, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(compiled.logits, plain.logits, atol=1e-4, rtol=1e-4)
    assert compiled.features.keys() == plain.features.keys()
    torch.testing.assert_close(compiled.features["layer3.1"], plain.features["layer3.1"], atol=1e-4, rtol=1e-4)
