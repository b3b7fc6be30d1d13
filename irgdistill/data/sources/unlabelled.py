"""Images without labels: folders of any shape, or another source's images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image

from irgdistill.errors import UserError

UNLABELLED = -1
"""In the place of a label; no loss term or metric takes it for a class."""


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


class PlainImages:
    """Every image in a folder and in the folders below it, ordered by file name: where one lies tells nothing."""

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
        with Image.open(self.paths[index]) as image:
            return image.convert("RGB"), UNLABELLED

    def describe(self, index: int) -> str:
        return str(self.paths[index])

    def labels(self) -> list[int]:
        return [UNLABELLED] * len(self)


class Unlabelled:
    """Another source's images, all with one label: none, unless said otherwise."""

    def __init__(self, source: Any, label: int = UNLABELLED) -> None:
        self.source, self.label = source, label

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.source.load(index)[0], self.label

    def describe(self, index: int) -> str:
        return str(self.source.describe(index))

    def labels(self) -> list[int]:
        return [self.label] * len(self)
