"""cache.json of a teacher cache: everything that determines its rows, as a typed record."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from irgdistill.config import STORES, Interpolation, Mean, Pixels, Pooling
from irgdistill.errors import UserError
from irgdistill.io import Record
from irgdistill.models import NetworkRecord

if TYPE_CHECKING:
    from typing_extensions import Self

CACHE_FORMAT = 1


class CachedNetwork(NetworkRecord):
    """The teacher of a cache: the values of `describe_teacher`."""

    weights: str
    """Checksum of its weights."""


class CachedImages(Record):
    """The images of a cache: the values of `describe_data`."""

    images: Annotated[int, Field(ge=1, lt=2**31)]
    classes: list[str]
    labels: str
    """Checksum of the classes of all images."""
    pixels: dict[str, str | None]
    """Key of a view -> checksum of its pixels; None: unreadable."""


class CachedViews(Record):
    """The views of a cache: the values of `describe_views` that are used as well as compared."""

    size: tuple[Pixels, Pixels]
    interpolation: Interpolation
    views: Annotated[int, Field(ge=1, lt=2**31)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    mean: Mean | None = None
    """Colour of what random erasing erases; None without it."""
    second_view: str | None = None
    """Policy of the second view; None: there is none."""
    exif_orientation: bool = False
    """Whether photos were turned upright, which older versions did not do."""


class CacheStorage(Record):
    """How rows are stored."""

    type: Literal[STORES]  # type: ignore[valid-type]
    logits: Literal["all"] | Annotated[int, Field(ge=1)]
    """The number of the largest logits that are stored."""


class Manifest(Record):
    """cache.json: everything that determines the rows."""

    format: Annotated[int, Field(ge=1)]
    name: str
    """timm name of the teacher."""
    classes: list[str] | None
    teacher: CachedNetwork
    data: CachedImages
    views: CachedViews
    taps: list[str]
    """Names of the taps whose pooled features are stored."""
    attention: list[str]
    """Names of the taps whose attention maps are stored."""
    grids: list[str] = Field(default_factory=list)
    """Names of the taps whose grids are stored."""
    maps: list[str] = Field(default_factory=list)
    """Names of the taps whose whole maps are stored."""
    embedding: Pooling | None = None
    """How the stored embedding was made; None: there is none."""
    storage: CacheStorage
    _values: dict[str, Any] = PrivateAttr()

    @classmethod
    def parse(cls, values: object, path: Path, what: str = "values") -> Self:
        """Validate the values of a file, or those to be written. Raises UserError as `read_manifest` does."""
        if isinstance(values, Mapping) and isinstance(values.get("format"), int) and values["format"] > CACHE_FORMAT:
            written = f"format {values['format']}, this one reads {CACHE_FORMAT}"
            raise UserError(f"{path} was written by a newer irgdistill ({written})")
        manifest = super().parse(values, path, what)
        manifest._values = json.loads(json.dumps(values))  # tuples become lists, as in the file
        return manifest

    @property
    def values(self) -> dict[str, Any]:
        """The values as they are in the file, which decide whether two caches are the same."""
        return self._values

    @property
    def checksum(self) -> str:
        """CRC-32 of the values, which every shard contains."""
        return f"{zlib.crc32(json.dumps(self.values, sort_keys=True).encode()):08x}"

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if self.classes is not None and len(self.classes) != self.teacher.num_classes:
            raise ValueError(f"the teacher has {self.teacher.num_classes} classes, and {len(self.classes)} names")
        if self.storage.logits != "all" and self.storage.logits >= self.teacher.num_classes:
            raise ValueError(f"storage.logits is {self.storage.logits}, of {self.teacher.num_classes} classes")
        return self


def manifest_path(folder: Path) -> Path:
    """The file of the manifest of the cache in `folder`."""
    return folder / "cache.json"


def read_manifest(folder: Path) -> Manifest | None:
    """Read cache.json; None if there is none. Raises UserError for a damaged or a newer one."""
    path = manifest_path(folder)
    return Manifest.from_json(path) if path.exists() else None
