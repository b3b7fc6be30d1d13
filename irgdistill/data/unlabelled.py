"""Image files by their paths, and images without labels: in folders of any structure, or those of another source."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from irgdistill.data.decoding import open_image
from irgdistill.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from irgdistill.data.search import ImageSearch
    from irgdistill.data.splits import Source

UNLABELLED = -1
"""Replaces a label. No loss term or metric takes it for a class."""


class ImageFiles:
    """Image files by their paths, with their labels if there are any."""

    def __init__(
        self, paths: Sequence[str], exif_orientation: bool = True, targets: Sequence[int] | None = None
    ) -> None:
        self.paths, self.exif_orientation = paths, exif_orientation
        self.targets = [UNLABELLED] * len(paths) if targets is None else list(targets)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.paths[index], self.exif_orientation), self.targets[index]

    def describe(self, index: int) -> str:
        return self.paths[index]

    def labels(self) -> list[int]:
        return list(self.targets)


class PlainImages(ImageFiles):
    """Images in a folder and all folders below it, ordered by file name, so that folders carry no information."""

    def __init__(self, root: Path, search: ImageSearch, exif_orientation: bool = True) -> None:
        paths = sorted(search.walk(root), key=lambda path: (os.path.basename(path), Path(path)))
        if not paths:
            raise UserError(f"no images in {root}")
        super().__init__(paths, exif_orientation)


class PartlyLabelled:
    """Images of another source, of which those with a number in `labelled` keep their label."""

    def __init__(self, source: Source, labelled: Collection[int]) -> None:
        self.source, self.labelled = source, frozenset(labelled)

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.source.load(index)
        return image, label if index in self.labelled else UNLABELLED

    def describe(self, index: int) -> str:
        return str(self.source.describe(index))

    def labels(self) -> list[int]:
        return [y if i in self.labelled else UNLABELLED for i, y in enumerate(self.source.labels())]


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
