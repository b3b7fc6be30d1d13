"""`irgdistill cache-teacher`: run the teacher once over every view of every training image."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from irgdistill.commands.requests import CacheRequest
from irgdistill.config import Config, Pooling
from irgdistill.data import Images, UnreadableImages, no_collate, train_images
from irgdistill.errors import Interrupted, UserError
from irgdistill.graph import unit
from irgdistill.io import Report, read_tensors, save_tensors, write_text
from irgdistill.losses import compared_maps
from irgdistill.matching import MAP_LAYOUTS, Output, Tap, Tapped, ends, match, tap_name
from irgdistill.models import Network, build_network, build_teacher, fold_batch_norm
from irgdistill.runtime import (
    Stopped,
    autocast,
    choose_device,
    ignore_signals,
    keep_memory,
    loader_context,
    slow_precision,
)
from irgdistill.training import (
    CACHE_FORMAT,
    DTYPES,
    SHARD,
    Manifest,
    check_classes,
    describe_data,
    describe_teacher,
    describe_views,
    manifest_path,
    open_data,
    pack_logits,
    read_manifest,
    resolved,
    shard_path,
    with_cached_orientation,
)


def cache_teacher(request: CacheRequest) -> None:
    """Write the missing shards of a cache; the same command resumes after an interruption.

    Raises UserError, if possible before the teacher runs.
    """
    config, report = resolved(request.config), Report()
    config = with_cached_orientation(config, read_manifest(request.output), request.output)
    asked = config
    config, splits, teachers, teacher_notes = open_data(
        asked, lambda: [build_teacher(spec) for spec in asked.all_teachers]
    )
    teacher = teachers[0]
    if teacher.note:
        report.line(teacher.note)
    if splits.streaming:
        raise UserError(f"{config.data.source} is a stream: its images have no numbers by which to find them again")
    for note in (*splits.notes, *teacher_notes):
        report.line(note)
    check_classes(config, teachers, splits.classes)
    largest = _largest(request.logits, teacher.num_classes)
    count = request.views or config.data.views or 1
    student = None if config.student.name is None else _student(config)
    crop = (student or teacher).input.covering(*(each.input for each in teachers))
    seed = config.seed if config.data.view_seed is None else config.data.view_seed
    views = describe_views(config, crop, count, seed)
    unreadable = UnreadableImages(config.data.max_bad_images, report.warn, report.line)
    images = train_images(splits, config.data, config.augment, crop, seed, unreadable)
    taps, attended = _taps(config, teacher, student)
    grids = attended if config.losses.comparing("grids") else []
    maps = _maps(config, teacher, student)
    if maps:
        size = count * len(images) * sum(tap.channels * tap.height * tap.width for tap in maps)
        gibibytes = size * DTYPES[request.store].itemsize / 2**30
        report.line(f"whole maps of {', '.join(map(tap_name, maps))}: {gibibytes:.1f} GiB")
    embedding = teacher.pooling if config.losses.comparing("embedding") or not teacher.num_classes else None
    values = {
        "format": CACHE_FORMAT,
        "name": teacher.name,
        "classes": teacher.classes,
        "teacher": describe_teacher(teacher),
        "data": describe_data(images, splits, count),
        "views": views,
        "taps": [tap_name(tap) for tap in taps],
        "attention": [tap_name(tap) for tap in attended],
        "storage": {"type": request.store, "logits": "all" if largest is None else largest},
        **({} if embedding is None else {"embedding": embedding}),
        **({"grids": [tap_name(tap) for tap in grids]} if grids else {}),
        **({"maps": [tap_name(tap) for tap in maps]} if maps else {}),
    }
    manifest = Manifest.parse(values, manifest_path(request.output))
    _claim(request.output, manifest)
    network = _on_device(config, teacher, taps, attended, grids, maps, embedding)
    try:
        ShardWriter(request.output, manifest, images, network, config, largest, DTYPES[request.store]).write(report)
    except Stopped as stop:
        raise Interrupted(128 + stop.number, f"{stop}; the cached rows are safe, the same command goes on") from None


def _largest(logits: str, classes: int) -> int | None:
    if logits == "all":
        return None
    if not classes:
        raise UserError(f"--logits {logits}: the teacher has no classifier, and its embedding is stored whole")
    if int(logits) >= classes:
        raise UserError(f"--logits {logits}: expected all, or a number from 1 to {classes - 1}")
    return int(logits)


def _student(config: Config) -> Network:
    name = config.student.name
    assert name is not None
    return build_network(name, input_size=config.student.input_size, args=config.student.args, meta=True)


def _taps(config: Config, teacher: Network, student: Network | None) -> tuple[list[Tap], list[Tap]]:
    """Taps to store, and those with a map, whose attention, and grid if the method compares any, is stored.

    Both ends of every level, for any student, and what the plan with the given one taps.
    """
    levels = teacher.levels()
    taps = [tap for level in levels for tap in (*(ends(level) or ()), level.exit)]
    exits = [level.exit for level in levels]
    if student is not None:
        plan = match(levels, student.levels(), config.matching)
        taps += plan.teacher_taps()
        exits += [pair.teacher.exit for pair in plan.pairs]
    return list(dict.fromkeys(taps)), [tap for tap in dict.fromkeys(exits) if tap.layout in MAP_LAYOUTS]


def _maps(config: Config, teacher: Network, student: Network | None) -> list[Tap]:
    """Taps whose whole maps the method compares. Raises UserError without a student, whose plan decides which."""
    losses = config.losses
    names = losses.comparing("maps")
    if names and student is None:
        raise UserError(f"{' and '.join(names)} compare{'s' * (len(names) == 1)} whole maps: give --student, too")
    if student is None or not names:
        return []
    return compared_maps(losses, match(teacher.levels(), student.levels(), config.matching))


def _claim(folder: Path, manifest: Manifest) -> None:
    """Write cache.json into a folder that is empty or holds the same cache. Raises UserError for any other."""
    present = read_manifest(folder)
    if present is None and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no teacher cache; give another --output")
    if present is not None and present.values != manifest.values:
        other = ", ".join(key for key, value in manifest.values.items() if present.values.get(key) != value)
        raise UserError(f"{folder} holds another cache (other {other}); give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(manifest_path(folder), json.dumps(manifest.values, indent=2) + "\n")


def _on_device(
    config: Config,
    teacher: Network,
    taps: list[Tap],
    attended: list[Tap],
    grids: list[Tap],
    maps: list[Tap],
    embedding: Pooling | None,
) -> Tapped:
    """The frozen teacher on the run's device."""
    device = choose_device(config.runtime.device)
    keep_memory(device)
    model = teacher.model.to(device)
    if config.runtime.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.runtime.fold_batch_norm:
        fold_batch_norm(model.eval(), teacher.input.size, {tap.module for tap in taps})
    view, last = teacher.preprocess().to(device), config.runtime.channels_last
    network = Tapped(model, view, taps, last, maps, attended, grids, embedding)
    return network.requires_grad_(False).eval()


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shards that a cache lacks."""

    folder: Path
    manifest: Manifest
    images: Images
    network: Tapped
    config: Config
    largest: int | None
    """Number of logits that are stored; None: all."""
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def write(self, report: Report) -> None:
        """Raises UserError as `_shard`."""
        checksum, images = self.manifest.checksum, self.manifest.data.images
        rows = images * self.manifest.views.views
        count = math.ceil(rows / SHARD)
        missing = [number for number in range(count) if not _intact(shard_path(self.folder, number), checksum)]
        report.line(f"{rows:,} views of {images:,} images: {len(missing)} of {count} files to write")
        precision = autocast(self.config.runtime.amp, self.device)
        if slow := slow_precision(self.config.runtime.amp, self.device):
            report.warn(slow)
        shards = [range(number * SHARD, min((number + 1) * SHARD, rows)) for number in missing]
        batches = self._batches(shards)
        with report.progress(rows, rows - len(missing) * SHARD):
            for done, (number, keys) in enumerate(zip(missing, shards, strict=True)):
                since = time.perf_counter()
                shard = self._shard(keys, batches, precision)
                save_tensors(shard_path(self.folder, number), shard, {"format": 2, "cache": checksum})
                rate = len(keys) / (time.perf_counter() - since)
                report.advance(rows - (len(missing) - done - 1) * SHARD, f"file {number + 1}/{count}", {}, rate)
        report.line(f"cached {count} files in {self.folder}: irgdistill distill --teacher-cache {self.folder} …")

    def _batches(self, shards: Sequence[range]) -> Iterator[tuple[Tensor, ...] | None]:
        """The batches of all shards in turn; none belongs to two of them."""
        data = self.config.data
        keys: list[Any] = [own for shard in shards for own in _cut(shard, data.eval_batch_size)]
        loader = DataLoader(
            self.images,
            batch_sampler=keys,
            num_workers=data.workers,
            collate_fn=no_collate,
            worker_init_fn=ignore_signals,
            multiprocessing_context=loader_context() if data.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    @torch.no_grad()
    def _shard(
        self, keys: range, batches: Iterator[tuple[Tensor, ...] | None], precision: AbstractContextManager[Any]
    ) -> dict[str, Tensor]:
        """The rows of these keys, in order. Raises UserError if too many images are unreadable."""
        data, parts = self.config.data, []
        views = 1 if self.manifest.views.second_view is None else 2
        for own, batch in zip(_cut(keys, data.eval_batch_size), batches, strict=False):
            if batch is None or len(batch[0]) != views * len(own):
                raise UserError(
                    f"more consecutive unreadable images than --max-bad-images {data.max_bad_images} allows"
                )
            with precision:
                output = self.network(batch[0].to(self.device, non_blocking=True))
            parts.append(self._rows(output))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _rows(self, output: Output) -> dict[str, Tensor]:
        known = self.manifest.teacher.num_classes > 0
        rows = pack_logits(output.logits, self.largest, self.dtype) if known else {}
        if output.embedding is not None:
            rows["embedding"] = output.embedding.to(self.dtype)
        rows |= {f"tap {name}": value.to(self.dtype) for name, value in output.features.items()}
        attention = {name: unit(value.flatten(1)).view_as(value) for name, value in output.energies.items()}
        rows |= {f"attention {name}": value.to(self.dtype) for name, value in attention.items()}
        rows |= {f"grid {name}": value.to(self.dtype) for name, value in output.grids.items()}
        rows |= {f"map {name}": value.to(self.dtype) for name, value in output.maps.items()}
        if self.manifest.views.second_view is not None:  # first views, then second ones -> a row of both for each image
            rows = {name: value.unflatten(0, (2, -1)).transpose(0, 1).contiguous() for name, value in rows.items()}
        return {name: value.cpu() for name, value in rows.items()}


def _cut(keys: range, size: int) -> list[range]:
    """Batches of `size` keys, the last with the rest."""
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def _intact(path: Path, checksum: str) -> bool:
    """Whether this shard is there, undamaged and of this cache."""
    try:
        return path.exists() and (read_tensors(path)[1] or {}).get("cache") == checksum
    except UserError:
        return False
