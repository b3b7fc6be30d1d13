"""`irgdistill inspect-graph`: compares the graphs of N images in a teacher and its students."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from irgdistill.commands.inspect.measures import Features, collect_features, compare_graphs, stages_of
from irgdistill.commands.inspect.networks import Inspection, image_name, known_networks, open_networks, show_plan
from irgdistill.commands.inspect.results import Results, format_number
from irgdistill.commands.inspect.terminal import show
from irgdistill.commands.requests import InspectRequest
from irgdistill.config import Config
from irgdistill.data import UnreadableImages, eval_loader
from irgdistill.errors import UserError
from irgdistill.io import Report, table
from irgdistill.losses import attended
from irgdistill.matching import print_plan
from irgdistill.runtime import choose_device


def inspect(request: InspectRequest) -> None:
    """Compare, write figures and report, and print the numbers. Raises UserError.

    All results are made in memory before the first file is written.
    """
    if request.plan_only:
        show_plan(request)
        return
    config, report = known_networks(request), Report()
    if request.output is not None:
        _check_output(request.output)
    inspection = open_networks(request, config)
    output = request.output or _default_output(request, inspection)
    _check_output(output)
    for network in inspection.networks:
        report.line(f"{network.label}: {network.weights}")
        if network.network.note:
            report.line(network.network.note)
    if not request.as_json:
        print_plan(inspection.plan, stdout=True)
    unreadable = UnreadableImages(inspection.data.max_bad_images, report.warn)
    features, names = _collect(inspection, request, config, unreadable)
    logits = all(network.network.num_classes > 0 for network in inspection.networks)
    labels = [network.label for network in inspection.networks]
    compared = compare_graphs(stages_of(inspection.plan, logits), labels, features, request.neighbours)
    results = Results(inspection, request, config.seed, features, compared)
    facts = results.write(output, names, sorted(unreadable.names))
    if request.as_json:
        _print_json(facts, output)
    else:
        _print_numbers(facts)
    if request.terminal:
        show(Console(stderr=request.as_json), results.views)
    report.line(f"report and figures: {output / 'report.html'}")


def _collect(
    inspection: Inspection, request: InspectRequest, config: Config, unreadable: UnreadableImages
) -> tuple[Features, list[str]]:
    """Run the networks over the drawn images; the second value is the names of those that could be read."""
    splits, data, plan = inspection.splits, inspection.data, inspection.plan
    device = choose_device(config.runtime.device)
    for note in splits.notes:
        Report().line(note)
    if len(splits.val_indices) < request.images:
        Report().warn(f"only {len(splits.val_indices)} images in the {request.split} split of {data.source}")
    teacher, *students = (network.network for network in inspection.networks)
    loader = eval_loader(splits, data, students[0].input.covering(teacher.input), device, unreadable)
    taps, maps = plan.student_taps(), attended(plan)
    networks = [teacher.tapped(device, plan.teacher_taps(), [tap for tap, _ in maps])]
    networks += [student.tapped(device, taps, [tap for _, tap in maps]) for student in students]
    features = collect_features(networks, loader)
    kept = [i for i in splits.val_indices if splits.val.describe(i) not in unreadable.names]
    assert len(kept) == len(features.labels)
    if len(kept) <= request.neighbours:
        raise UserError(f"--neighbours {request.neighbours}: only {len(kept)} images could be read")
    return features, [image_name(splits.val, i, data) for i in kept]


def _print_json(facts: Mapping[str, Any], output: Path) -> None:
    keys = ("teacher", "students", "data", "seed", "neighbours", "unreadable", "stages", "files")
    values = {key: facts[key] for key in keys} | {"images": len(facts["images"]), "output": str(output)}
    print(json.dumps(values, indent=2))  # noqa: T201  the command's result


def _print_numbers(facts: Mapping[str, Any]) -> None:
    several = len(facts["students"]) > 1
    columns = ["stage", *(["student"] if several else []), "edges", "r", "ρ", f"near@{facts['neighbours']}", "CKA"]
    columns += ["transform", "r", "positions"]
    rows = []
    for stage in facts["stages"]:
        for name, numbers in stage["numbers"].items():
            edges, moved = numbers["edges"], numbers["transformation"] or {}
            values = [edges[key] for key in ("mse", "pearson", "spearman", "neighbours", "cka")]
            values += [moved.get("mse"), moved.get("pearson"), numbers["positions"]]
            rows.append([stage["name"], *([name] if several else []), *map(format_number, values)])
    table(f"{len(facts['images'])} images of {facts['data']['source']}, seed {facts['seed']}", columns, rows)
    legend = "edges, transform: mean squared difference, as in the loss; r: Pearson, ρ: Spearman correlation; "
    legend += "positions: r of the cosines between an image's positions"
    Report(stdout=True).line(f"  {legend}")


def _default_output(request: InspectRequest, inspection: Inspection) -> Path:
    if request.target is not None and Path(request.target).is_dir():
        return Path(request.target) / "graphs"
    teacher, student = inspection.teacher.network, inspection.students[0].network
    return Path("graphs") / f"{teacher.architecture}-{student.architecture}"


def _check_output(output: Path) -> None:
    """Raises UserError if nothing can be written there, before anything is computed."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {output}: {existing} is {'not writable' if existing.is_dir() else 'a file'}")
