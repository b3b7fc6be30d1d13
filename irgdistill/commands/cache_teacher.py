"""`irgdistill cache-teacher`: run the teacher once over every view of every training image."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from irgdistill.commands.requests import CacheRequest
from irgdistill.config import Config
from irgdistill.data import UnreadableImages, no_collate, train_images
from irgdistill.errors import Interrupted, UserError
from irgdistill.graph import unit
from irgdistill.io import Report, read_tensors, save_tensors, write_text
from irgdistill.matching import MAP_LAYOUTS, Output, Tap, Tapped, ends, match, tap_name
from irgdistill.models import Network, build_network, build_teacher, fold_batch_norm
from irgdistill.runtime import Stopped, autocast, choose_device, ignore_signals, keep_memory
from irgdistill.training import (
    FORMAT,
    SHARD,
    TYPES,
    check_classes,
    describe_data,
    describe_teacher,
    describe_views,
    mark_of,
    open_data,
    pack_logits,
    read_description,
    resolved,
    shard_path,
)


def cache_teacher(request: CacheRequest) -> None:
    """Write what is missing of the cache; the same call goes on after an interruption.

    Raises UserError before the teacher runs for whatever can be known by then.
    """
    config = resolved(request.config)
    splits, teacher = open_data(config, lambda: build_teacher(config))
    assert teacher is not None
    if splits.streaming:
        raise UserError(f"{config.data.source} is a stream: its images have no numbers under which to find them again")
    check_classes(config, teacher, splits.classes)
    largest = _largest(request.logits, teacher.num_classes)
    count = request.views or config.data.views or 1
    student = None if config.student.name is None else _student(config)
    crop = (student or teacher).input.covering(teacher.input)
    seed = config.seed if config.data.view_seed is None else config.data.view_seed
    views = describe_views(config.augment, crop, count, seed)
    report = Report()
    bad = UnreadableImages(config.data.max_bad_images, report.warn)
    images = train_images(splits, config.data, config.augment, crop, seed, bad)
    taps, attended = _taps(config, teacher, student)
    about: dict[str, Any] = {
        "format": FORMAT,
        "name": teacher.name,
        "classes": teacher.classes,
        "teacher": describe_teacher(teacher),
        "data": describe_data(images, splits, count),
        "views": views,
        "taps": [tap_name(tap) for tap in taps],
        "attention": [tap_name(tap) for tap in attended],
        "storage": {"type": request.store, "logits": "all" if largest is None else largest},
    }
    about = json.loads(json.dumps(about))  # as it will be read
    there = read_description(request.output)
    if there is None and request.output.exists() and any(request.output.iterdir()):
        raise UserError(f"{request.output} is not empty and holds no teacher cache; give another --output")
    if there not in (None, about):
        what = ", ".join(key for key in about if there is not None and there.get(key) != about[key])
        raise UserError(f"{request.output} holds another cache (other {what}); give another --output")
    request.output.mkdir(parents=True, exist_ok=True)
    write_text(request.output / "cache.json", json.dumps(about, indent=2) + "\n")
    device = choose_device(config.runtime.device)
    keep_memory(device)
    model = teacher.model.to(device)
    if config.runtime.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.runtime.fold_batch_norm:
        fold_batch_norm(model.eval(), teacher.input.size, {tap.module for tap in taps})
    network = Tapped(model, teacher.preprocess().to(device), taps, config.runtime.channels_last, energies=attended)
    network.requires_grad_(False).eval()
    try:
        _write(request.output, about, images, network, config, largest, TYPES[request.store], report)
    except Stopped as stop:
        raise Interrupted(128 + stop.number, f"{stop}; what is cached stays, the same command goes on") from None


def _largest(logits: str, classes: int) -> int | None:
    if logits == "all":
        return None
    if int(logits) >= classes:
        raise UserError(f"--logits {logits}: expected all, or a number from 1 to {classes - 1}")
    return int(logits)


def _student(config: Config) -> Network:
    name = config.student.name
    assert name is not None
    return build_network(name, input_size=config.student.input_size, args=config.student.args, meta=True)


def _taps(config: Config, teacher: Network, student: Network | None) -> tuple[list[Tap], list[Tap]]:
    """What any student may ask for: both ends of every level; and what the given one does. And the exits with a map."""
    levels = teacher.levels()
    taps = [tap for level in levels for tap in (*(ends(level) or ()), level.exit)]
    exits = [level.exit for level in levels]
    if student is not None:
        plan = match(levels, student.levels(), config.matching)
        taps += plan.teacher_taps()
        exits += [pair.teacher.exit for pair in plan.pairs]
    return list(dict.fromkeys(taps)), [tap for tap in dict.fromkeys(exits) if tap.layout in MAP_LAYOUTS]


def _write(
    folder: Path,
    about: dict[str, Any],
    images: Any,
    network: Tapped,
    config: Config,
    largest: int | None,
    dtype: torch.dtype,
    report: Report,
) -> None:
    mark, rows = mark_of(about), about["data"]["images"] * about["views"]["views"]
    count = math.ceil(rows / SHARD)
    left = [number for number in range(count) if not _whole(shard_path(folder, number), mark)]
    report.line(f"{rows:,} views of {about['data']['images']:,} images: {len(left)} of {count} files to write")
    precision = autocast(config.runtime.amp, next(network.parameters()).device)
    with report.progress(rows, rows - len(left) * SHARD):
        for done, number in enumerate(left):
            keys = range(number * SHARD, min((number + 1) * SHARD, rows))
            since = time.perf_counter()
            tensors = _shard(images, keys, network, config, precision, largest, dtype)
            save_tensors(shard_path(folder, number), tensors, {"format": 2, "cache": mark})
            rate = len(keys) / (time.perf_counter() - since)
            report.advance(rows - (len(left) - done - 1) * SHARD, f"file {number + 1}/{count}", {}, rate)
    report.line(f"cached {count} files in {folder}: irgdistill distill --teacher-cache {folder} …")


def _whole(path: Path, mark: str) -> bool:
    """Whether this shard needs no writing; a damaged one does."""
    try:
        return path.exists() and (read_tensors(path)[1] or {}).get("cache") == mark
    except UserError:
        return False


@torch.no_grad()
def _shard(
    images: Any,
    keys: range,
    network: Tapped,
    config: Config,
    precision: Any,
    largest: int | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Rows of these keys, in their order."""
    device, parts = next(network.parameters()).device, []
    loader = DataLoader(
        images,
        batch_size=config.data.eval_batch_size,
        sampler=keys,
        num_workers=config.data.workers,
        collate_fn=no_collate,
        worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if config.data.workers and images.cache is not None else None,
        pin_memory=device.type == "cuda",
    )
    for pixels, *_ in loader:
        with precision:
            output = network(pixels.to(device, non_blocking=True))
        parts.append(_rows(output, largest, dtype))
    result = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if any(len(value) != len(keys) for value in result.values()):
        raise UserError(f"more unreadable images in a row than --max-bad-images {config.data.max_bad_images} allows")
    return result


def _rows(output: Output, largest: int | None, dtype: torch.dtype) -> dict[str, Any]:
    rows = pack_logits(output.logits, largest, dtype)
    rows |= {f"tap {name}": value.to(dtype) for name, value in output.features.items()}
    attention = {name: unit(value.flatten(1)).view_as(value) for name, value in output.energies.items()}
    rows |= {f"attention {name}": value.to(dtype) for name, value in attention.items()}
    return {name: value.cpu() for name, value in rows.items()}
