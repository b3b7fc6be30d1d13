"""`irgdistill predict`: class and probability of each image, one row at a time, as CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from irgdistill.commands.embed import upright
from irgdistill.commands.image_requests import PredictRequest
from irgdistill.config import DataConfig, find_source
from irgdistill.data import ImageFiles, ImageSearch, OnePass
from irgdistill.errors import UserError
from irgdistill.io import Report, visible, write_atomically
from irgdistill.models import Network, class_names, open_network
from irgdistill.runtime import autocast, choose_device, keep_memory

Row = tuple[str, list[tuple[str, float]]]
"""A file, and its most probable classes with their probabilities, the first the largest."""


def predict(request: PredictRequest) -> None:
    """Write a row for each image that can be read. Raises UserError: no classifier, nothing to read."""
    config, report = request.config, Report()
    network, metadata = open_network(request.target, request.checkpoint, config.student.input_size)
    if not network.num_classes:
        raise UserError(f"{network.name} has no classifier, so it predicts no classes; irgdistill embed embeds images")
    pretrained = metadata is None and request.checkpoint is None
    names = class_names(network, pretrained)
    files = ImageFiles(_paths(request.images, config.data, report), upright(metadata))
    device = choose_device(config.runtime.device)
    keep_memory(device)
    limit = config.data.max_bad_images if "data.max_bad_images" in request.given else None
    images = OnePass(files, config.data, network.input, device, report.warn, limit=limit)
    top = min(request.top, network.num_classes)
    write = _json_row if request.as_json else _csv_row

    def write_all(file: BinaryIO, shown: Callable[[str], str] = str) -> None:
        if not request.as_json:
            file.write(_csv_line(_header(top)))
        bar = Report(quiet=file is sys.stdout.buffer and sys.stdout.isatty())  # else its rows show the progress
        for name, classes in _predicted(network, images, names, top, config.runtime.amp, bar):
            file.write(write(shown(name), [(shown(each), probability) for each, probability in classes]))

    if request.output is None:
        sys.stdout.flush()
        write_all(sys.stdout.buffer, visible if sys.stdout.isatty() else str)  # in a pipe, names are exact
        sys.stdout.buffer.flush()
    else:
        write_atomically(request.output, lambda path: _into(path, write_all))
    read = len(images) - images.unreadable
    report.line(f"{read:,} of {len(images):,} images predicted, {images.unreadable:,} unreadable")


def _into(path: Path, write: Callable[[BinaryIO], None]) -> None:
    with path.open("wb") as file:
        write(file)


def _paths(given: Sequence[str], data: DataConfig, report: Report) -> list[str]:
    """The files, those of lists, and the images in the folders by their paths. Raises UserError for what is neither."""
    search, paths = ImageSearch(data.search_limit), list[str]()
    for path in given:
        listed = find_source(path).paths
        if listed is not None and os.path.isfile(path):
            paths += listed(data.replaced({"source": path}))
        elif os.path.isdir(path):
            found = sorted(search.walk(Path(path)))
            if not found:
                raise UserError(f"no images in {path}")
            paths += found
        elif os.path.isfile(path):
            paths.append(path)
        else:
            raise UserError(f"{path} is no file or folder" if os.path.lexists(path) else f"no file or folder {path}")
    if str(search):
        report.line(str(search))
    return paths


@torch.no_grad()
def _predicted(
    network: Network, images: OnePass, names: Sequence[str], top: int, amp: str, report: Report
) -> Iterator[Row]:
    """The rows of all images that can be read, in order."""
    device = images.loader.device
    model, precision, start, done = network.tapped(device), autocast(amp, device), time.perf_counter(), 0
    with report.progress(len(images), 0):
        for batch, positions in images:
            with precision:
                logits = model(batch).logits.float()
            probabilities, classes = logits.softmax(1).topk(top, dim=1)
            for position, values, indices in zip(
                positions.tolist(), probabilities.tolist(), classes.tolist(), strict=True
            ):
                yield images.name(position), [(names[i], value) for i, value in zip(indices, values, strict=True)]
            done += len(positions)
            report.advance(int(positions[-1]) + 1, "predicting", {}, done / (time.perf_counter() - start))


def _header(top: int) -> list[str]:
    others = [f"{word}_{i}" for i in range(2, top + 1) for word in ("class", "probability")]
    return ["file", "class", "probability", *others]


def _csv_line(values: Sequence[str]) -> bytes:
    """A line of CSV; bytes of file names that are not UTF-8 stay as they are."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode("utf-8", "surrogateescape")


def _csv_row(file: str, classes: Sequence[tuple[str, float]]) -> bytes:
    return _csv_line([file, *(word for name, value in classes for word in (name, f"{value:.6f}"))])


def _json_row(file: str, classes: Sequence[tuple[str, float]]) -> bytes:
    found = [{"class": name, "probability": round(value, 6)} for name, value in classes]
    return json.dumps({"file": file, "classes": found}).encode() + b"\n"
