"""The student's part of knowledge review: deeper stages are fused into shallower ones (Chen et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irgdistill.matching import Output, Tap, tap_name

MIDDLE = 512
"""Most channels in which stages are fused."""


class Fusion(nn.Module):
    """Attention-based fusion: a stage's map and what the deeper stages have become, weighed position by position."""

    def __init__(self, width: int, middle: int, width_out: int, deepest: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(width, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
        self.expand = nn.Sequential(nn.Conv2d(middle, width_out, 3, 1, 1, bias=False), nn.BatchNorm2d(width_out))
        for part in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(part[0].weight, a=1)  # type: ignore[arg-type]

    def forward(self, x: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) and the fused map of the next deeper stage -> (B, D, H, W), the fused map (B, M, H, W)."""
        x = self.reduce(x)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
            weights = self.attention(torch.cat([x, deeper], dim=1))
            x = x * weights[:, :1] + deeper * weights[:, 1:]
        return self.expand(x), x


class Review(nn.Module):
    """Fuses the maps of `stages`, pairs of (teacher, student) taps in order of depth, and the last stage's mean.

    The results are named by their number, the mean first and then the stages from the deepest on; each has the
    student's size and the teacher's width.
    """

    def __init__(self, stages: Sequence[tuple[Tap, Tap]]) -> None:
        super().__init__()
        stages = list(reversed(stages))
        self.names = [tap_name(student) for _, student in stages]
        middle = min(MIDDLE, stages[0][1].channels)
        self.fusions = nn.ModuleList(
            Fusion(student.channels, middle, teacher.channels, deepest=i == 0)
            for i, (teacher, student) in enumerate([stages[0], *stages])
        )

    def forward(self, images: Tensor, output: Output) -> dict[str, Tensor]:
        maps = [output.maps[name] for name in self.names]
        deeper, results = None, {}
        for i, (fusion, x) in enumerate(zip(self.fusions, [maps[0].mean((2, 3), keepdim=True), *maps], strict=True)):
            results[str(i)], deeper = fusion(x, deeper)
        return results
