"""A .tar of class folders, read in place by timm's reader.

timm names the archive's parts, orders its classes and reports unreadable images in ways that differ from folders.
"""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

from PIL import Image
from timm.data import create_dataset

from irgdistill.errors import UserError, one_line


class TarSource:
    """Images of one archive. The class of an image is its folder, or the inner archive that holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:  # no cached handles: worker processes would share the position in an open archive
            dataset = create_dataset("", root=str(path), search_split=False, cache_tarfiles=False, cache_tarinfo=False)
        except (ValueError, IndexError):
            raise UserError(f"no images in {path}") from None
        except (tarfile.TarError, OSError, AssertionError) as error:
            raise UserError(f"{path} is not an uncompressed tar archive: {one_line(error)}") from None
        self.reader = dataset.reader
        own: dict[str, int] = self.reader.class_name_to_idx
        self.classes = sorted(own)
        """Sorted by name, as class folders are."""
        label = {own[name]: position for position, name in enumerate(self.classes)}
        self.targets = [label[int(target)] for target in self.reader.targets]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        try:
            handle, _ = self.reader[index]
            with handle:
                return Image.open(handle).convert("RGB"), self.targets[index]
        except tarfile.TarError as error:
            raise OSError(f"{self.describe(index)}: {error}") from None

    def describe(self, index: int) -> str:
        return f"{self.path}/{self.reader.filename(index)}"

    def labels(self) -> list[int]:
        return list(self.targets)

    def parts(self) -> dict[str, list[int]]:
        """Folders above class folders, such as `train`, with the indices of their images."""
        found: dict[str, list[int]] = {}
        for i in range(len(self)):
            for name in set(PurePosixPath(self.reader.filename(i)).parts[:-2]):
                found.setdefault(name, []).append(i)
        return found
