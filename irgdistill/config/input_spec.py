"""How a network wants its images. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class InputSpec:
    """Size and preprocessing of a network's input."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    """Of each channel, for pixels in [0, 1]."""
    std: tuple[float, ...]
    """Of each channel, for pixels in [0, 1]."""
    interpolation: str
    """`bilinear`, `bicubic`, … as timm names them."""
    crop_pct: float
    """Share of the resized image that validation crops."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return len(self.mean), *self.size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """All but the size, in plain values."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
        }

    def covering(self, *others: InputSpec | None) -> InputSpec:
        """The same at the larger height and the larger width of all: a crop from which each size can be reduced."""
        sizes = [self.size, *(other.size for other in others if other is not None)]
        return replace(self, size=(max(size[0] for size in sizes), max(size[1] for size in sizes)))
