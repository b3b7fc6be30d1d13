"""`irgdistill eval`: networks on validation images, as a table or JSON."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

from irgdistill.commands.image_requests import EvalRequest
from irgdistill.commands.probe import Probe
from irgdistill.config import Config, DataConfig, data_of
from irgdistill.data import UnreadableImages, eval_loader, open_splits
from irgdistill.errors import UserError
from irgdistill.io import Report, table
from irgdistill.models import Network, multiply_adds, open_network, parameters, put_in_order
from irgdistill.runtime import autocast, choose_device, keep_memory, slow_precision
from irgdistill.training import Metrics, difference, evaluate


def evaluate_targets(request: EvalRequest) -> None:
    """Evaluate each target and print a table, or JSON: one object, or a list of them for several targets."""
    config, against, against_checkpoint = request.config, request.against, request.against_checkpoint
    if against is None and against_checkpoint is not None:  # an irgdistill checkpoint knows its architecture
        against, against_checkpoint = str(against_checkpoint), None
    size, own, other = config.student.input_size, config.student.preprocessing.given, config.teacher.preprocessing.given
    opened = [open_network(target, request.checkpoint, size, preprocessing=own) for target in request.targets]
    sets = [
        data_of(target, None, config.data, request.given)
        if metadata is None
        else data_of(target, metadata.data, config.data, request.given, metadata.plugins)
        for target, (_, metadata) in zip(request.targets, opened, strict=True)
    ]
    teacher = open_network(against, against_checkpoint, None, "teacher", other)[0] if against else None
    results = []
    probe = None if request.probe is None else Probe(request.probe, config, Report())
    for target, (network, metadata), data in zip(request.targets, opened, sets, strict=True):
        if probe is None:
            measured = asdict(_evaluate(network, teacher, data, config))
        else:
            measured = probe.measure(network, data, metadata, teacher)
        values = {"name": target, "architecture": network.architecture, **measured}
        values |= {"params": parameters(network.model), "macs": multiply_adds(network), "data": data.source}
        results.append({key: value for key, value in values.items() if value is not None})
    if request.as_json:
        print(json.dumps(results[0] if len(results) == 1 else results, indent=2))  # noqa: T201  the command's result
    else:
        _print_results(results)


def _evaluate(network: Network, teacher: Network | None, data: DataConfig, config: Config) -> Metrics:
    device, report = choose_device(config.runtime.device), Report()
    keep_memory(device)
    if not network.num_classes:
        raise UserError(f"{network.name} has no classifier; --probe knn classifies by its embeddings")
    splits = open_splits(data, val_only=True, classes=network.classes or network.num_classes)
    if not splits.labelled and teacher is None:
        raise UserError(
            f"the validation images of {data.source} have no labels: give --against TEACHER, or other --data"
        )
    if network.num_classes != len(splits.classes):
        raise UserError(
            f"{network.name} has {network.num_classes} classes, {data.source} has {len(splits.classes)}: not comparable"
        )
    if network.classes is not None and network.classes != splits.classes:
        raise UserError(f"the class names of {data.source} are not those that {network.name} was trained on")
    if slow := slow_precision(config.runtime.amp, device):
        report.warn(slow)
    for note in splits.notes:
        report.line(note)
    bad = UnreadableImages(data.max_bad_images, report.warn)
    crop = network.input.covering(None if teacher is None else teacher.input)
    loader = eval_loader(splits, data, crop, device, bad)
    against = None if teacher is None else _comparable(teacher, splits.classes, report).tapped(device)
    amp = autocast(config.runtime.amp, device)
    return evaluate(network.tapped(device), loader, amp, against, labelled=splits.labelled)


def _comparable(teacher: Network, classes: list[str], report: Report) -> Network:
    """A copy with its classes in the data's order, if it names them. Raises UserError for another number of classes."""
    teacher = replace(teacher, model=deepcopy(teacher.model))
    if note := put_in_order(teacher, classes):
        report.line(note)
    problem = difference(teacher, classes, f"--against {teacher.name}")
    if teacher.num_classes != len(classes):
        raise UserError(f"{problem}: their logits cannot be compared; --probe knn compares embeddings")
    if problem:
        report.warn(f"{problem}: agreement and KL compare classes by their numbers")
    return teacher


def _print_results(results: list[dict[str, Any]]) -> None:
    columns = {
        "top-1 %": ("top1", "{:.2f}"),
        "top-5 %": ("top5", "{:.2f}"),
        "k-NN top-1 %": ("knn_top1", "{:.2f}"),
        "teacher's k-NN top-1 %": ("teacher_knn_top1", "{:.2f}"),
        "linear top-1 %": ("linear_top1", "{:.2f}"),
        "teacher's linear top-1 %": ("teacher_linear_top1", "{:.2f}"),
        "loss": ("loss", "{:.4f}"),
        "calibration %": ("calibration_error", "{:.2f}"),
        "agreement %": ("agreement", "{:.2f}"),
        "KL": ("kl", "{:.4f}"),
        "parameters": ("params", "{:,}"),
        "multiply-adds": ("macs", "{:,}"),
        "images/s": ("images_per_second", "{:,.0f}"),
    }
    rows = [
        [title, *(form.format(result[key]) if key in result else "–" for result in results)]
        for title, (key, form) in columns.items()
        if any(key in result for result in results)
    ]
    names = [result["name"] for result in results]
    seen = [f"{result['images']:,} images of {result['data']}" for result in results]
    if len(set(seen)) > 1:
        rows.insert(0, ["on", *seen])
    table(seen[0] if len(set(seen)) == 1 else "different images", ["", *names], rows)
