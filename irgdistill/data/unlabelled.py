"""Images without labels: in folders of any structure, or those of another source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from irgdistill.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from irgdistill.data.splits import Source

UNLABELLED = -1
"""Replaces a label. No loss term or metric takes it for a class."""


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


class PlainImages:
    """Images in a folder and all folders below it, ordered by file name, so that folders carry no information."""

    def __init__(self, root: Path) -> None:
        paths = (Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
        self.paths = sorted(
            (path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")),
            key=lambda path: (path.name, path),
        )
        if not self.paths:
            raise UserError(f"no images in {root}")

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> tuple[Image.Image, int]:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return image.convert("RGB"), UNLABELLED

    def describe(self, index: int) -> str:
        return str(self.paths[index])

    def labels(self) -> list[int]:
        return [UNLABELLED] * len(self)


class Unlabelled:
    """Images of another source, all with the same `label`."""

    def __init__(self, source: Source, label: int = UNLABELLED) -> None:
        self.source, self.label = source, label

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.source.load(index)[0], self.label

    def describe(self, index: int) -> str:
        return str(self.source.describe(index))

    def labels(self) -> list[int]:
        return [self.label] * len(self)
