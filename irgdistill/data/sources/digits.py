"""scikit-learn's handwritten digits as a data source."""

from __future__ import annotations

import numpy as np
from PIL import Image

from irgdistill.errors import UserError


class DigitsSource:
    """scikit-learn's handwritten digits: 1,797 images of 8×8 grey pixels."""

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("--data digits needs scikit-learn: pip install 'irgdistill[digits]'") from None
        digits = load_digits()
        self.pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
        self.targets = digits.target.astype(int)

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.targets[index])

    def describe(self, index: int) -> str:
        return f"digit {index}"

    def labels(self) -> list[int]:
        return [int(label) for label in self.targets]
