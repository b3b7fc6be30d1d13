"""Levels, taps and pooling: hand-written networks, a model left untouched, measured timm networks, real forwards."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from irgdistill.matching.levels import Level, LevelsError, Tap, find_levels
from irgdistill.matching.pooling import pool

GOLDEN = Path(__file__).resolve().parents[3] / "shared/golden/timm_taps.json"

# One network per family, quick ones: convolutional, dense, plain, two-path, multi-resolution, windows, tokens.
QUICK = """
cait_xxs24_384 coat_lite_mini convit_tiny convnext_femto_ols crossvit_15_dagger_408 csatv2_21m densenet169
dla46x_c dpn48b efficientvim_m1_dist efficientvit_m4 gcvit_small ghostnetv3_160 hieradet_small hrnet_w40
inception_v4 levit_128s mobilenetv3_small_050 mobileone_s3 nasnetalarge nest_tiny_jx nextvit_large
regnetx_006 resnet50_clip_gap rexnet_300 selecsls42 swin_s3_tiny_224 tf_efficientnet_b0 tiny_vit_21m_384
vgg11_bn vit_base_patch16_sapiens2 vit_small_patch14_reg4_dinov2 volo_d1_224 xcit_nano_12_p8_384
""".split()  # noqa: SIM905

# Where the measured taps are deliberately not followed: the level's exit, or entry and exit.
# - xcit: the measured exit is the last class-attention block. Nearly all its weights see the class token alone, so
#   the map that is pooled there is no longer worked on: the exit is the last block that mixes patches.
# - selecsls: blocks return [output, shortcut]; the measured exit is the shortcut, which later blocks of the stage
#   only pass on. The output is tapped (element 0), and it is wider than its predecessors.
XCIT = {
    name: {level: {"exit": [f"blocks.{last}", channels, size, size, "BLC", 0]}}
    for name, level, last, channels, size in (
        ("xcit_nano_12_p16_384", "4", 11, 128, 24),
        ("xcit_nano_12_p8_384", "3", 11, 128, 48),
        ("xcit_small_12_p16_224", "4", 11, 384, 14),
        ("xcit_small_24_p8_224", "3", 23, 384, 28),
        ("xcit_tiny_12_p16_384", "4", 11, 192, 24),
    )
}
DIFFERENT: dict[str, dict[str, dict[str, Any]]] = {
    **XCIT,
    "selecsls42": {
        "2": {"exit": ["features.1", 128, 56, 56, "NCHW", 0]},
        "3": {"exit": ["features.3", 288, 28, 28, "NCHW", 0]},
        "4": {"exit": ["features.5", 480, 14, 14, "NCHW", 0]},
    },
    "selecsls60": {
        "2": {"exit": ["features.1", 128, 56, 56, "NCHW", 0]},
        "3": {"exit": ["features.4", 288, 28, 28, "NCHW", 0], "entry": None},
        "4": {"exit": ["features.8", 416, 14, 14, "NCHW", 0], "entry": None},
    },
}


# -- small networks with known blocks --------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(width, out, 1, stride) if stride > 1 or width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.down(x))


class ResNet(nn.Module):
    """The 6n+2 network of CIFAR: three stages named layer1 to layer3."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1)
        self.layer1 = nn.Sequential(*(Residual(width, width) for _ in range(depth)))
        self.layer2 = self._stage(width, depth)
        self.layer3 = self._stage(2 * width, depth)
        self.fc = nn.Linear(4 * width, 10)

    @staticmethod
    def _stage(width: int, depth: int) -> nn.Sequential:
        rest = (Residual(2 * width, 2 * width) for _ in range(depth - 1))
        return nn.Sequential(Residual(width, 2 * width, 2), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(self.conv1(x)))).mean((2, 3)))


class TokenBlock(nn.Module):
    """A transformer's MLP half, on (B, L, C) or (B, H, W, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(self.norm(x)).relu())


class ClassBlock(TokenBlock):
    """Class attention: keys and values of all tokens, everything else for the class token."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.k, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.q, self.proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        attention = (self.q(y[:, :1]) @ self.k(y).transpose(1, 2)).softmax(-1)
        token = x[:, :1] + self.proj(attention @ self.v(y))
        token = token + self.fc2(self.fc1(token).relu())
        return torch.cat([token, x[:, 1:] + y[:, 1:]], dim=1)


class Transformer(nn.Module):
    """Patches, class token and registers, token blocks; `tail` class-attention blocks."""

    def __init__(self, depth: int = 4, prefix: int = 1, tail: int = 0) -> None:
        super().__init__()
        self.num_prefix_tokens = prefix
        self.proj = nn.Conv2d(3, 12, 4, 4)
        self.tokens = nn.Parameter(torch.randn(1, prefix, 12))
        self.blocks = nn.ModuleList(TokenBlock(12) for _ in range(depth))
        self.class_blocks = nn.ModuleList(ClassBlock(12) for _ in range(tail))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], dim=1)
        for block in [*self.blocks, *self.class_blocks]:
            x = block(x)
        return self.head(x[:, 0])


class ChannelsLast(nn.Module):
    """Token blocks on (B, H, W, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(TokenBlock(width), TokenBlock(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.proj(x).permute(0, 2, 3, 1)).mean((1, 2)))


class TwoPath(nn.Module):
    """A block that hands on two tensors of one map, one of which grows (DPN)."""

    def __init__(self, width: int, extra: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width + extra, width, 3, padding=1)
        self.b = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y = self.a(torch.cat(pair, dim=1)).relu()
        return pair[0] + y, torch.cat([pair[1], self.b(y)], dim=1)


class DualPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_a, self.conv_b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 4, 3, 2, 1)
        self.blocks = nn.Sequential(TwoPath(8, 4), TwoPath(8, 8))
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat(self.blocks((self.conv_a(x), self.conv_b(x))), dim=1).mean((2, 3)))


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"no such shape {self.conv(x).shape}\nand a second line")


def plain_net() -> nn.Module:
    """VGG in small: convolutions in a row, an in-place activation after each."""

    def unit(width: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]

    body = [*unit(3, 8), nn.MaxPool2d(2), *unit(8, 16), *unit(16, 16), nn.MaxPool2d(2), *unit(16, 24)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def summary(levels: list[Level]) -> list[tuple[int, str | None, str, str]]:
    return [(lv.level, lv.entry.module if lv.entry else None, lv.exit.module, lv.kind) for lv in levels]


def test_cifar_resnet_has_one_level_per_stage() -> None:
    levels = find_levels(ResNet(), (3, 32, 32))
    assert summary(levels) == [
        (0, "layer1.0", "layer1.1", "block"),
        (1, "layer2.0", "layer2.1", "block"),
        (2, "layer3.0", "layer3.1", "block"),
    ]
    assert levels[2].exit == Tap("layer3.1", 32, 8, 8, "NCHW")
    assert [tap.module for tap in levels[1].blocks] == ["layer2.0", "layer2.1"]


def test_stages_of_one_block_take_an_equally_wide_tensor_as_entry() -> None:
    levels = find_levels(ResNet(depth=1), (3, 32, 32))
    # layer1's input has its width. The others downsample inside the block: the first tensor in it that nothing
    # overwrites (bn1 and bn2 feed in-place operations) and that a weight still follows is the convolution.
    assert summary(levels) == [
        (0, "conv1", "layer1.0", "stage-input"),
        (1, "layer2.0.conv1", "layer2.0", "inner"),
        (2, "layer3.0.conv1", "layer3.0", "inner"),
    ]


def test_exit_of_another_width_is_no_partner() -> None:
    model = ResNet()
    model.layer3 = nn.Sequential(Residual(16, 32, 2), Residual(32, 32), Residual(32, 48))
    model.fc = nn.Linear(48, 10)
    last = find_levels(model, (3, 32, 32))[-1]
    assert last.kind == "block-inner"
    assert last.entry == Tap("layer3.0", 32, 8, 8, "NCHW")
    assert last.exit == Tap("layer3.2", 48, 8, 8, "NCHW")


def test_plain_network_taps_what_follows_each_convolution() -> None:
    assert summary(find_levels(plain_net(), (3, 32, 32))) == [
        (0, None, "2", "single"),
        (1, "6", "9", "block"),
        (2, "10", "13", "unequal"),
    ]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_are_one_level_with_all_blocks(prefix: int) -> None:
    (level,) = find_levels(Transformer(depth=5, prefix=prefix, tail=0), (3, 32, 32))
    assert summary([level]) == [(2, "blocks.0", "blocks.4", "block")]
    assert level.exit == Tap("blocks.4", 12, 8, 8, "BLC", prefix)
    assert len(level.blocks) == 5


def test_tokens_of_a_wide_image() -> None:
    (level,) = find_levels(Transformer(), (3, 32, 64))
    assert (level.exit.height, level.exit.width, level.level) == (8, 16, 2)


def test_class_attention_is_no_block() -> None:
    (level,) = find_levels(Transformer(depth=3, tail=2), (3, 32, 32))
    assert level.exit.module == "blocks.2"


@pytest.mark.parametrize("width", [8, 12])
def test_channels_last_also_where_all_axes_are_equal(width: int) -> None:
    (level,) = find_levels(ChannelsLast(width), (3, 32, 32))
    assert level.exit == Tap("blocks.1", width, 8, 8, "NHWC")


def test_two_tensors_of_one_map_are_joined() -> None:
    model = DualPath()
    (level,) = find_levels(model, (3, 32, 32))
    assert level.exit == Tap("blocks.1", 20, 16, 16, "NCHW")
    assert level.kind == "unequal"
    output = model.blocks((torch.randn(2, 8, 5, 5), torch.randn(2, 4, 5, 5)))
    torch.testing.assert_close(pool(output, level.exit), torch.cat(output, dim=1).mean((2, 3)))


def test_half_precision() -> None:
    assert len(find_levels(ResNet().half(), (3, 32, 32))) == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10)), "no block with a map"),
        (Broken(), r"^Broken at input size \(3, 32, 32\) does not run on the meta device: no such shape"),
        (nn.Linear(7, 10), "does not run"),
    ],
)
def test_what_cannot_be_tapped_is_said_in_one_line(model: nn.Module, message: str) -> None:
    with pytest.raises(LevelsError, match=message) as caught:
        find_levels(model, (3, 32, 32))
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "prefix", "shape", "mean"),
    [
        ("NCHW", 0, (2, 5, 3, 4), lambda x: x.mean((2, 3))),
        ("NHWC", 0, (2, 3, 4, 5), lambda x: x.mean((1, 2))),
        ("BLC", 0, (2, 12, 5), lambda x: x.mean(1)),
        ("BLC", 2, (2, 14, 5), lambda x: x[:, 2:].mean(1)),
        ("BTNC", 0, (2, 3, 4, 5), lambda x: x.mean((1, 2))),
        ("BCPN", 0, (2, 5, 3, 4), lambda x: x.mean((2, 3))),
    ],
)
def test_pool_by_hand(layout: str, prefix: int, shape: tuple[int, ...], mean: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    tap = Tap("m", 5, 7, 7, layout, prefix)  # planned at another size than it is used
    assert pool(x, tap).dtype == torch.float64
    torch.testing.assert_close(pool(x, tap), mean(x))
    low = x.bfloat16()
    assert pool(low, tap).dtype == torch.float32
    torch.testing.assert_close(pool(low, tap), mean(low.float()))
    element = Tap("m", 5, 7, 7, layout, prefix, index=1)
    torch.testing.assert_close(pool((None, x), element), mean(x))


# -- the model stays as it was ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("layout", "prefix"), [("NCHW", 0), ("NHWC", 0), ("BLC", 1)])
def test_pooling_has_the_gradient_of_the_mean(
    layout: str, prefix: int, memory: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irgdistill.matching.pooling._MapMean.COPY", 1)  # narrow maps two images at a time
    x = torch.randn(3, 5, 4, 6, dtype=dtype) if prefix == 0 else torch.randn(3, 5, 6, dtype=dtype)
    x = x.contiguous(memory_format=memory) if x.ndim == 4 else x
    tap = Tap("m", 6, 4, 5, layout, prefix)
    axes = [axis for axis, letter in enumerate(layout) if axis > 0 and letter != "C"]
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = pool(mine, tap)
    expected = theirs[:, prefix:].mean(axes, dtype=torch.promote_types(dtype, torch.float32))
    weights = torch.randn_like(found)
    for a, b in ((found, mine), (expected, theirs)):
        ((a * weights).sum() + (b.float() ** 2).sum()).backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert mine.grad is not None and mine.grad.shape == x.shape
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


def test_model_is_left_untouched() -> None:
    model = ResNet().train()
    model.layer2.eval()
    model.conv1.requires_grad_(False)
    handle = model.layer3.register_forward_hook(lambda *_: None)
    state = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    with torch.no_grad():
        levels = find_levels(model, (3, 32, 32))
    with torch.inference_mode():
        assert find_levels(model, (3, 32, 32)) == levels
    assert find_levels(copy.deepcopy(model).to("meta"), (3, 32, 32)) == levels
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"conv1.weight", "conv1.bias"}
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters())
    assert list(model.layer3._forward_hooks) == [handle.id]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1


class Sharing(ResNet):
    """A parameter in two modules, and a module in two others (as in CoaT)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1[1].conv1.weight = self.layer1[0].conv1.weight
        self.layer2[1].conv2 = self.layer2[1].conv1
        self.layer3[1].bn2 = self.layer3[0].bn2


def test_shared_parameters_and_modules_stay_in_place() -> None:
    model = Sharing()
    held = {name: tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.named_buffers(remove_duplicate=False)}
    assert len(find_levels(model, (3, 32, 32))) == 3
    assert all(tensor is held[name] for name, tensor in model.named_parameters(remove_duplicate=False))
    assert all(tensor is buffers[name] for name, tensor in model.named_buffers(remove_duplicate=False))


# -- measured timm networks ------------------------------------------------------------------------------------------


def golden() -> dict[str, Any]:
    if not GOLDEN.exists():
        pytest.skip(f"no measured taps at {GOLDEN}")
    models: dict[str, Any] = json.loads(GOLDEN.read_text())["models"]
    return models


def firing(model: nn.Module, name: str | None) -> str | None:
    """The measured taps name containers; a Sequential is tapped at its last child, whose output it returns."""
    while name and type(model.get_submodule(name)).forward is nn.Sequential.forward:
        name = f"{name}.{list(model.get_submodule(name)._modules)[-1]}"
    return name


def check_golden(name: str) -> None:
    measured = golden()[name]
    model = timm.create_model(name, pretrained=False, device="meta")
    levels = find_levels(model, model.pretrained_cfg["input_size"])
    assert [str(level.level) for level in levels] == sorted(measured)
    for level in levels:
        expected = {**measured[str(level.level)], **DIFFERENT.get(name, {}).get(str(level.level), {})}
        tap = level.exit
        found = [tap.module, tap.channels, tap.height, tap.width, tap.layout, tap.prefix]
        assert found == [firing(model, expected["exit"][0]), *expected["exit"][1:]]
        entry = level.entry.module if level.entry and level.kind == "block" else None
        assert entry == firing(model, expected.get("entry"))  # measured only where two blocks are equally wide
        assert level.blocks[-1] == level.exit
        assert (level.entry is None) == (level.kind == "single")


PARTS = 4
"""Tests into which the networks are divided, for several processes."""


@pytest.mark.parametrize("name", QUICK)
def test_golden_quick(name: str) -> None:
    check_golden(name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(PARTS))
def test_golden_all(part: int) -> None:
    """Every third network that is not among the quick ones; all of them if IRGDISTILL_ALL_NETWORKS is set."""
    failed = {}
    step = 1 if os.environ.get("IRGDISTILL_ALL_NETWORKS") else 3
    names = [name for name in golden() if name not in QUICK][::step][part::PARTS]
    assert len(names) > 15
    for name in names:
        try:
            check_golden(name)
        except AssertionError as error:
            failed[name] = str(error)
    assert not failed


# -- real forwards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenetv2_100",
        "convnext_atto",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "selecsls42",
        "hrnet_w18_small",
        "mobilevitv2_050",
    ],
)
def test_every_tap_fires_once_on_a_real_forward(name: str) -> None:
    model = timm.create_model(name, pretrained=False)
    size = model.pretrained_cfg["input_size"]
    levels = find_levels(model, size)
    assert levels == find_levels(timm.create_model(name, pretrained=False, device="meta"), size)
    taps = {tap for level in levels for tap in (level.entry, *level.blocks) if tap}
    seen: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    for tap in taps:
        module = model.get_submodule(tap.module)
        module.register_forward_hook(lambda _m, _a, output, tap=tap: seen[tap].append(pool(output, tap)))
    with torch.no_grad():
        model.eval()(torch.randn(2, *size))
    for tap, values in seen.items():
        assert len(values) == 1, tap
        assert values[0].shape == (2, tap.channels)
        assert values[0].isfinite().all()


def test_prefix_tokens_are_left_out_of_a_real_network() -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    (level,) = find_levels(model, (3, 224, 224))
    assert (level.exit.prefix, level.exit.height, level.exit.width) == (1, 14, 14)
    kept: list[Tensor] = []
    model.get_submodule(level.exit.module).register_forward_hook(lambda _m, _a, output: kept.append(output))
    with torch.no_grad():
        model(torch.randn(2, 3, 224, 224))
    (tokens,) = kept
    torch.testing.assert_close(pool(tokens, level.exit), tokens[:, 1:].sum(1) / 196)


def test_taps_serve_other_sizes() -> None:
    model = timm.create_model("resnet18", pretrained=False).eval()
    tap = find_levels(model, (3, 224, 224))[-1].exit
    kept: list[Tensor] = []
    model.get_submodule(tap.module).register_forward_hook(lambda _m, _a, output: kept.append(pool(output, tap)))
    with torch.no_grad():
        model(torch.randn(5, 3, 64, 96))
    assert kept[0].shape == (5, 512)
