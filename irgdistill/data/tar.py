"""Uncompressed .tar archives of class folders, read in place: members are found once, then read by their position."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, NamedTuple

from irgdistill.data.class_folders import natural_key
from irgdistill.data.decoding import open_image
from irgdistill.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image

    from irgdistill.data.search import ImageSearch


class Member(NamedTuple):
    """An image in an archive."""

    name: str
    """Path within the archive, or within the inner archive that holds it."""
    class_name: str
    start: int
    """First byte in the outer archive."""
    size: int


class TarSource:
    """Images of one archive. The class of an image is its folder, or the inner archive that holds it."""

    def __init__(self, path: Path, search: ImageSearch, exif_orientation: bool = True) -> None:
        self.path = path
        self.exif_orientation = exif_orientation
        folders: set[str] = set()
        try:
            with path.open("rb") as file:
                members = list(_members(file, "", 0, search, folders))
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path} is not an uncompressed tar archive: {one_line(error)}") from None
        if not members:
            raise UserError(f"no images in {path}")
        self.members = sorted(members, key=lambda member: natural_key(member.name))
        self.classes = sorted({member.class_name for member in members})
        """Sorted by name, as class folders are."""
        self.empty = {PurePosixPath(folder).name for folder in folders} - set(self.classes)
        """Names of folders without images of their own."""
        label = {name: position for position, name in enumerate(self.classes)}
        self.targets = [label[member.class_name] for member in self.members]

    def __len__(self) -> int:
        return len(self.members)

    def load(self, index: int) -> tuple[Image.Image, int]:
        member = self.members[index]
        with self.path.open("rb") as file:  # not kept open: loader workers would share its position
            file.seek(member.start)
            content = file.read(member.size)
        return open_image(io.BytesIO(content), self.exif_orientation), self.targets[index]

    def describe(self, index: int) -> str:
        return f"{self.path}/{self.members[index].name}"

    def labels(self) -> list[int]:
        return list(self.targets)

    def parts(self) -> dict[str, list[int]]:
        """Folders above class folders, such as `train`, with the indices of their images."""
        found: dict[str, list[int]] = {}
        for i, member in enumerate(self.members):
            for name in set(PurePosixPath(member.name).parts[:-2]):
                found.setdefault(name, []).append(i)
        return found


def _members(file: IO[bytes], inside: str, start: int, search: ImageSearch, folders: set[str]) -> Iterator[Member]:
    """Images of an archive whose first byte is `start` in the outer one; `inside` is the name of an inner archive.

    Adds the names of folders to `folders`.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        inner: list[tarfile.TarInfo] = []
        own: list[Member] = []
        for member in archive:
            folder, name = os.path.split(member.name)
            if member.isdir():
                folders.add(member.name)
            if member.isdir() or any(part.startswith(".") and part != "." for part in PurePosixPath(folder).parts):
                continue
            if not inside and member.isfile() and name.lower().endswith(".tar"):
                inner.append(member)
            elif search.take(member.name, member.isfile):
                class_name = os.path.basename(os.path.join(inside, folder).rstrip("/"))
                own.append(Member(member.name, class_name, start + member.offset_data, member.size))
        for member in inner:
            content = archive.extractfile(member)
            assert content is not None
            label = os.path.splitext(os.path.basename(member.name))[0]
            yield from _members(content, label, start + member.offset_data, search, folders)
        yield from own
