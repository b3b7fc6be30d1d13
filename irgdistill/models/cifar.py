"""Small CIFAR networks as in their papers, registered with timm: 3×3 stem, three stages at 32, 16 and 8 pixels.

ResNets: He et al. 2016, section 4.2, with parameter-free shortcuts (every second pixel, channels padded with zeros);
keys `conv1 bn1 layer{1,2,3}.{b}.{conv1,bn1,conv2,bn2} fc`. ResNets "x4", by which the field compares (Tian et al.
2020): a stem of 32 channels, stages of 64, 128, 256, and 1×1 convolutions as shortcuts, `downsample.{0,1}`. ShuffleNet:
Zhang et al. 2018, width 0.5, 3 groups, its first stage at full resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _CifarNet(nn.Module):
    """The part that both families share: timm's interface, three stages and a linear head on the pooled map."""

    conv1: nn.Module
    bn1: nn.Module

    def __init__(self, widths: tuple[int, ...], num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": f"layer{i + 1}"} for i, width in enumerate(widths)
        ]
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    def stages(self) -> Iterator[nn.Sequential]:
        """The three stages in order."""
        for name in ("layer1", "layer2", "layer3"):
            yield self.get_submodule(name)  # type: ignore[misc]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/4, W/4)"""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages():
            for block in stage:
                x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn, add, relu. `projection`: shortcuts to another shape are 1×1 convolutions with a norm."""

    def __init__(self, width_in: int, width: int, stride: int, projection: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padding = width - width_in
        self.downsample = None
        if projection and (stride != 1 or self.padding):
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride != 1 or self.padding:
            before = self.padding // 2
            x = F.avg_pool2d(x, 1, self.stride)  # every stride-th pixel; a slice's gradient would not be channels-last
            x = F.pad(x, (0, 0, 0, 0, before, self.padding - before))
        return F.relu(x + y)


class CifarResNet(_CifarNet):
    """6n+2 layers: n = `blocks` blocks in each of three stages of the given widths.

    `stem`: width of the first convolution, by default that of the first stage; `projection` as in `BasicBlock`.
    """

    def __init__(
        self,
        blocks: int = 3,
        widths: tuple[int, int, int] = (16, 32, 64),
        stem: int | None = None,
        projection: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(widths, num_classes, drop_rate)
        width_in = stem or widths[0]
        self.conv1 = nn.Conv2d(in_chans, width_in, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        for i, width in enumerate(widths):
            first = BasicBlock(width_in, width, 2 if i else 1, projection)
            rest = [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
            width_in = width
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ShuffleBlock(nn.Module):
    """Grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; added to the input, or concatenated if wider."""

    def __init__(self, width_in: int, width: int, stride: int, groups: int, grouped_first: bool = True) -> None:
        super().__init__()
        self.concat = width != width_in
        width_out = width - width_in if self.concat else width
        middle = width // 4
        first_groups = groups if grouped_first else 1
        self.groups = first_groups
        self.conv1 = nn.Conv2d(width_in, middle, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, width_out, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(width_out)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        y = self.bn3(self.conv3(self.bn2(self.conv2(y))))
        if self.stride != 1:
            x = F.avg_pool2d(x, 3, self.stride, 1)
        return F.relu(torch.cat([x, y], 1) if self.concat else x + y)


class CifarShuffleNet(_CifarNet):
    """ShuffleNet (v1) with stages of 4, 8 and 4 blocks."""

    def __init__(
        self,
        blocks: tuple[int, int, int] = (4, 8, 4),
        widths: tuple[int, int, int] = (120, 240, 480),
        stem: int = 12,
        groups: int = 3,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(widths, num_classes, drop_rate)
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        width_in = stem
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = [
                ShuffleBlock(width if b else width_in, width, 2 if i and not b else 1, groups, bool(i or b))
                for b in range(count)
            ]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            width_in = width
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": _cfg()
        for name in (
            "cifar_resnet20",
            "cifar_resnet20_x0_5",
            "cifar_resnet20_x0_375",
            "cifar_resnet14_x0_5",
            "cifar_resnet56",
            "cifar_resnet110",
            "cifar_resnet8x4",
            "cifar_resnet32x4",
            "cifar_shufflenet_x0_5",
        )
    }
)


Entry = Callable[..., nn.Module]
register: Callable[[Entry], Entry] = register_model  # timm's decorator has no types


def _build(cls: type[nn.Module], name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    device = kwargs.pop("device", None)
    with torch.device(device) if device is not None else nullcontext():
        model: nn.Module = build_model_with_cfg(cls, name, pretrained, **kwargs)
    return model


@register
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20, 16/32/64, 0.27 M parameters."""
    return _build(CifarResNet, "cifar_resnet20", pretrained, **kwargs)


@register
def cifar_resnet20_x0_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 of half the width, 8/16/32."""
    return _build(CifarResNet, "cifar_resnet20_x0_5", pretrained, **{"widths": (8, 16, 32), **kwargs})


@register
def cifar_resnet20_x0_375(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 of 0.375 the width, 6/12/24."""
    return _build(CifarResNet, "cifar_resnet20_x0_375", pretrained, **{"widths": (6, 12, 24), **kwargs})


@register
def cifar_resnet14_x0_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-14 of half the width, 8/16/32."""
    return _build(CifarResNet, "cifar_resnet14_x0_5", pretrained, **{"blocks": 2, "widths": (8, 16, 32), **kwargs})


@register
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56, 16/32/64, 0.85 M parameters."""
    return _build(CifarResNet, "cifar_resnet56", pretrained, **{"blocks": 9, **kwargs})


@register
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110, 16/32/64, 1.7 M parameters."""
    return _build(CifarResNet, "cifar_resnet110", pretrained, **{"blocks": 18, **kwargs})


def _x4(name: str, blocks: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    wide = {"blocks": blocks, "stem": 32, "widths": (64, 128, 256), "projection": True}
    return _build(CifarResNet, name, pretrained, **{**wide, **kwargs})


@register
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-8 of four times the width, 64/128/256 behind a stem of 32, 1.2 M parameters."""
    return _x4("cifar_resnet8x4", 1, pretrained, **kwargs)


@register
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 of four times the width, 64/128/256 behind a stem of 32, 7.4 M parameters."""
    return _x4("cifar_resnet32x4", 5, pretrained, **kwargs)


@register
def cifar_shufflenet_x0_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNet 0.5×, 3 groups, 120/240/480, 0.24 M parameters."""
    return _build(CifarShuffleNet, "cifar_shufflenet_x0_5", pretrained, **kwargs)
