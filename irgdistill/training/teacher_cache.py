"""The teacher's outputs for every view of every training image, on disk: written once, read by any number of students.

DIR/cache.json                    the manifest: teacher, data, augmentation, taps, storage
DIR/00000.safetensors, 00001…     SHARD rows each, checksummed: logits, pooled taps, attention maps, grids, maps

A row is a view of an image: its number is view · N + image, the key by which `data.Images` seeds its augmentation. The
files are mapped into memory, so that only rows that are asked for are loaded.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from irgdistill.config import (
    STORES,
    Config,
    InputSpec,
    LossesConfig,
    TeacherConfig,
)
from irgdistill.data import Images, PartlyLabelled, Splits, crop_of, padding_of
from irgdistill.errors import UserError
from irgdistill.io import checksum, map_tensors, read_tensors
from irgdistill.losses import compared_maps
from irgdistill.matching import MAP_LAYOUTS, Output, Plan, Tap, tap_name
from irgdistill.models import Network, rebuild_network
from irgdistill.training.cache_manifest import read_manifest
from irgdistill.training.stored_logits import unpack_logits

SHARD = 4096
"""Rows of a file: an interruption loses at most these."""


COMPARED_VIEWS = 64
"""Views whose pixels are compared when a cache is used."""


DTYPES = dict(zip(STORES, (torch.float16, torch.float32), strict=True))


ROWS = {"taps": "tap", "energies": "attention", "grids": "grid", "maps": "map"}
"""What `Tapped` collects at a tap -> the first word of its name in a shard; the second is that of the tap."""


def shard_path(folder: Path, number: int) -> Path:
    """The file of rows number · SHARD and following."""
    return folder / f"{number:05d}.safetensors"


def describe_teacher(teacher: Network) -> dict[str, Any]:
    """Everything that determines the teacher's outputs for given pixels."""
    weights = {name: value.cpu() for name, value in teacher.model.state_dict().items()}
    return {**teacher.describe(), "weights": checksum("", weights)}


def describe_views(run: Config, input_spec: InputSpec, views: int, seed: int) -> dict[str, Any]:
    """Everything that determines the pixels of a view of a given image. Raises UserError for mixup and cutmix."""
    config = run.augment
    if config.mixup or config.cutmix:
        raise UserError(
            "a teacher cache holds outputs for single images, and the output for a mix is not the mix of outputs: "
            "leave out --mixup and --cutmix, or the cache"
        )
    size = input_spec.size
    crop = crop_of(config, size)
    chosen: dict[str, Any] = {"crop": crop, "hflip": config.hflip, "color_jitter": config.color_jitter}
    chosen |= {"auto_augment": config.auto_augment, "erase": config.erase}
    if crop == "pad":
        chosen["padding"] = padding_of(config, size)
    if crop == "resized":
        chosen |= {"scale": list(config.scale), "ratio": list(config.ratio)}
    if run.data.exif_orientation:  # older caches lack the key
        chosen["exif_orientation"] = True
    if run.data.second_view is not None:
        chosen["second_view"] = run.data.second_view
    if config.erase:
        chosen["mean"] = list(input_spec.mean)
    return {**chosen, "size": list(size), "interpolation": input_spec.interpolation, "views": views, "seed": seed}


def describe_data(images: Images, splits: Splits, views: int) -> dict[str, Any]:
    """The number of images, their classes and labels, and checksums of the pixels of some views."""
    source = splits.train.source if isinstance(splits.train, PartlyLabelled) else splits.train  # all labels, if any
    labels = source.labels()
    own = torch.tensor([labels[i] for i in images.indices])
    rows = len(images) * views
    compared = sorted({i * rows // COMPARED_VIEWS for i in range(COMPARED_VIEWS)})
    found = {key: images[key] for key in compared}
    return {
        "images": len(images),
        "classes": splits.classes,
        "labels": checksum("", {"labels": own}),
        "pixels": {
            str(key): None if sample is None else f"{zlib.crc32(torch.as_tensor(sample[0]).numpy().tobytes()):08x}"
            for key, sample in found.items()
        },
    }


class TeacherCache:
    """A cache to train from. Raises UserError: the folder holds none, or cache.json is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder} holds no teacher cache (no cache.json); `irgdistill cache-teacher` makes one")
        self.manifest = manifest
        self.views = manifest.views
        self.row_count = manifest.data.images * self.views.views
        self._shards: list[dict[str, Tensor]] = []

    def crop(self, student: InputSpec) -> InputSpec:
        """The cached crop, for a student with the input `student`."""
        return replace(
            student,
            size=self.views.size,
            interpolation=self.views.interpolation,
            mean=self.views.mean or student.mean,
        )

    def teacher(self) -> Network:
        """The teacher without weights, for matching."""
        network = rebuild_network(self.manifest.teacher, meta=True)
        network.name, network.classes = self.manifest.name, self.manifest.classes
        network.pooling = self.manifest.embedding or "auto"
        return network

    def check_terms(self, losses: LossesConfig, plan: Plan | None, asked: TeacherConfig, answers: bool = True) -> None:
        """Raises UserError if a term needs what is not cached.

        `asked`: the settings of this teacher; `answers`: its logits are compared.
        """
        self._check_embedding(losses, asked)
        whole = losses.needing_all_logits() if answers else []
        if whole and self.manifest.storage.logits != "all":
            unset = " ".join(f"--set losses.{name}.weight=0" for name in whole)
            raise UserError(
                f"{' and '.join(whole)} need{'s' * (len(whole) == 1)} every logit, and {self.folder} keeps the "
                f"{self.manifest.storage.logits} largest: {unset}, or a cache made with --logits all"
            )
        missing = [name for tap in (plan.teacher_taps() if plan else ()) if (name := tap_name(tap)) not in self.taps]
        exits = [pair.teacher.exit for pair in plan.pairs] if plan else []
        mapped = [tap for tap in exits if tap.layout in MAP_LAYOUTS]
        if losses.comparing("energies"):
            missing += [tap_name(tap) for tap in mapped if tap_name(tap) not in self.manifest.attention]
        if missing:
            raise UserError(
                f"the run taps {', '.join(missing)} of the teacher, which {self.folder} does not hold; "
                "give cache-teacher the same --student, --levels and --taps-teacher"
            )
        self._check_stored("grids", losses.comparing("grids"), mapped, self.manifest.grids)
        if plan is not None:
            self._check_stored("whole maps", losses.comparing("maps"), compared_maps(losses, plan), self.manifest.maps)

    def _check_stored(self, what: str, terms: Sequence[str], taps: Sequence[Tap], stored: Sequence[str]) -> None:
        missing = [tap_name(tap) for tap in taps if terms and tap_name(tap) not in stored]
        if missing:
            raise UserError(
                f"{' and '.join(terms)} compare{'s' * (len(terms) == 1)} {what} of {', '.join(missing)}, which "
                f"{self.folder} does not hold; give cache-teacher the same --method and weights, and the same --student"
            )

    def _check_embedding(self, losses: LossesConfig, asked: TeacherConfig) -> None:
        used, cached = losses.comparing("embedding"), self.manifest.embedding
        if used and cached is None:
            raise UserError(
                f"{' and '.join(used)} compare{'s' * (len(used) == 1)} embeddings, which {self.folder} does not hold; "
                "give cache-teacher the same --method and weights"
            )
        if used and "pooling" in asked.model_fields_set and asked.pooling != cached:
            raise UserError(f"teacher.pooling = {asked.pooling}, but the teacher cache {self.folder} has {cached}")

    @property
    def taps(self) -> list[str]:
        """Names of the taps whose pooled features are stored."""
        return self.manifest.taps

    def check_same(self, part: Literal["teacher", "data", "views"], now: Mapping[str, Any]) -> None:
        """Compare a part of the manifest with that of a run. Raises UserError if they differ."""
        then = self.manifest.values[part]
        for key, value in now.items():
            if value != then.get(key):
                what = f": {key} {shortened(value)}, was {shortened(then.get(key))}"
                raise UserError(f"the teacher cache {self.folder} was made of {_OTHER[part]}{what}")

    def open(self, where: Mapping[str, Iterable[Tap]] | None = None) -> None:
        """Map all shards into memory and verify their checksums; of values at taps only those of `where` are read.

        Raises UserError for a shard that is missing, damaged or of another cache.
        """
        mark = self.manifest.checksum
        wanted = {f"{word} {tap_name(tap)}" for kind, word in ROWS.items() for tap in (where or {}).get(kind, ())}
        count = math.ceil(self.row_count / SHARD)
        missing = [number for number in range(count) if not shard_path(self.folder, number).exists()]
        if missing:
            raise UserError(
                f"the teacher cache {self.folder} is not complete: {count - len(missing)} of {count} files; "
                "repeat its `cache-teacher` command"
            )
        for number in range(count):
            tensors, metadata = read_tensors(shard_path(self.folder, number))
            if metadata is None or metadata.get("cache") != mark:
                raise UserError(f"{shard_path(self.folder, number)} belongs to another teacher cache than cache.json")
            if where is not None:
                tensors = {name: x for name, x in tensors.items() if " " not in name or name in wanted}
            self._shards.append(tensors)

    def __getstate__(self) -> dict[str, Any]:
        """With the names in place of the tensors: a loader process maps the files itself."""
        return {**vars(self), "_shards": [list(tensors) for tensors in self._shards]}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._shards = [map_tensors(shard_path(self.folder, i), names) for i, names in enumerate(state["_shards"])]

    def rows(self, keys: Sequence[int]) -> dict[str, Tensor]:
        """The rows of these keys: tensors (B, …) by name."""
        index = torch.as_tensor(keys)
        result: dict[str, Tensor] = {}
        for number in (index // SHARD).unique().tolist():
            here = index // SHARD == number
            for name, tensor in self._shards[number].items():
                if name not in result:
                    result[name] = tensor.new_empty(len(index), *tensor.shape[1:])
                result[name][here] = tensor[index[here] % SHARD]
        return result

    @property
    def row_bytes(self) -> int:
        """Length of a row of `teacher_rows`."""
        return sum(stored[0].nbytes for stored in self._shards[0].values())

    def teacher_rows(self, keys: Sequence[int]) -> Tensor:
        """The same as one tensor, bytes (B, n): one transfer between processes and to the device."""
        rows = self.rows(keys)
        return torch.cat([rows[name].reshape(len(keys), -1).view(torch.uint8) for name in self._shards[0]], 1)

    def output(self, teacher_rows: Tensor) -> Output:
        """Decode bytes (B, n) of `teacher_rows` to the teacher's output in float32.

        With a second view, the rows hold both of each image, and the output is (2·B, …): first all first views.
        """
        rows, start = {}, 0
        at_taps: dict[str, dict[str, Tensor]] = {word: {} for word in ROWS.values()}
        for name, stored in self._shards[0].items():
            end = start + stored[0].nbytes
            own = teacher_rows[:, start:end].contiguous()
            rows[name], start = own.view(stored.dtype).reshape(len(own), *stored.shape[1:]), end
            if self.views.second_view is not None:
                rows[name] = rows[name].transpose(0, 1).flatten(0, 1)
        for key, value in rows.items():
            word, _, name = key.partition(" ")
            if name:
                at_taps[word][name] = value.float()
        embedding = rows["embedding"].float() if "embedding" in rows else None
        classes = self.manifest.teacher.num_classes
        logits = unpack_logits(rows, classes) if classes or embedding is None else embedding
        pooled, energies, grids, maps = (at_taps[word] for word in ROWS.values())
        return Output(logits, pooled, maps, energies, grids, embedding=embedding)


_OTHER = {"teacher": "another teacher", "data": "other images", "views": "views of another recipe"}


def shortened(value: Any) -> str:
    """A value of a manifest for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
