"""`digits`: scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill.data.sources import source
from irgdistill.data.splits import Splits, hold_out

if TYPE_CHECKING:
    from PIL.Image import Image

    from irgdistill.config import DataConfig


@source("digits", package="sklearn", install="'irgdistill[digits]'")
def open_digits(config: DataConfig, val_only: bool = False) -> Splits:
    """The digits, of which `val_fraction` (default 0.3) is held out for validation."""
    digits = Digits()
    return hold_out(digits, digits.labels(), [str(i) for i in range(10)], config.val_fraction or 0.3)


class Digits:
    """1,797 images of 8×8 grey pixels."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.pixels = (digits.images * (255 / 16)).round().astype("uint8")
        self.targets = digits.target.astype(int)

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image, int]:
        from PIL import Image

        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.targets[index])

    def describe(self, index: int) -> str:
        return f"digit {index}"

    def labels(self) -> list[int]:
        return [int(label) for label in self.targets]
