"""Images in class folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from irgdistill.data.unlabelled import ImageFiles
from irgdistill.errors import UserError

if TYPE_CHECKING:
    from irgdistill.data.search import ImageSearch


class ClassFolders(ImageFiles):
    """Images in the folders `classes` of `root`, ordered as timm orders them: 2.png before 10.png.

    Raises UserError if there are none, or if some lie deeper.
    """

    def __init__(self, root: Path, classes: Sequence[str], search: ImageSearch, exif_orientation: bool = True) -> None:
        if outside := sum(1 for _ in search.walk(root, below=False)):
            search.left_out["outside class folders"] += outside
        found: list[tuple[str, int]] = []
        for label, name in enumerate(classes):
            folder = root / name
            for path in search.walk(folder):
                if os.path.dirname(path) != str(folder):
                    below = folder / Path(path).relative_to(folder).parts[0]
                    raise UserError(f"{below} holds images deeper than a class folder: put them into {folder}")
                found.append((path, label))
        if not found:
            raise UserError(f"no images in {root}")
        filled = {label for _, label in found}
        self.empty = [name for label, name in enumerate(classes) if label not in filled]
        """Classes whose folders hold no images."""
        found.sort(key=lambda item: (natural_key(item[0]), item[0]))
        super().__init__([path for path, _ in found], exif_orientation, [label for _, label in found])


def natural_key(text: str) -> list[str | int]:
    """Sorts numbers within names by their value, and ignores case."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]
