"""The table of a comparison: means, spreads, paired differences and curves of finished runs."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from irgdistill.commands.compare.curves import curves_figure
from irgdistill.commands.compare.statistics import mean_and_deviation, paired_interval
from irgdistill.commands.inspect.figures import render
from irgdistill.config import Config, public_name
from irgdistill.data import Loader, UnreadableImages, eval_loader, open_splits
from irgdistill.errors import UserError
from irgdistill.io import (
    SELECTING,
    Report,
    RunFolder,
    Summary,
    markdown,
    markdown_table,
    records,
    table,
    visible_values,
    write_atomically,
    write_text,
)
from irgdistill.models import Network, build_teacher, restore
from irgdistill.runtime import autocast, choose_device
from irgdistill.version import __version__

BASELINE = "none"


@dataclass(frozen=True, eq=False)
class Run:
    """One method under one seed."""

    config: Config
    folder: RunFolder

    @property
    def name(self) -> str:
        return f"{self.config.method}, seed {self.config.seed}"

    def with_precision(self, amp: str) -> Run:
        return replace(self, config=self.config.replaced({"runtime.amp": amp}))


@dataclass(frozen=True)
class Scores:
    """What a finished run reached, in percent."""

    metric: str
    """The metric by which its best weights were selected, of `SELECTING`: accuracy where there are labels."""
    last: float
    """After the last epoch."""
    best: float
    """Of the best epoch."""
    epochs: int
    """Epochs trained."""
    seconds: float
    images_per_second: float


def summary_of(run: Run) -> Scores:
    """The scores of a finished run. Raises UserError if its summary cannot be read."""
    path = run.folder.summary
    try:
        summary = Summary.from_json(path)
        for metric in SELECTING:
            last, best = getattr(summary, f"last_{metric}"), getattr(summary, metric)
            if last is not None and best is not None:
                epochs = min(summary.epochs, run.config.schedule.epochs)
                return Scores(metric, last, best, epochs, summary.seconds, summary.images_per_second)
        raise UserError(f"{path} is damaged: expected one of {', '.join(SELECTING)}, and last_ of the same")
    except UserError as error:
        raise UserError(f"{error}; delete {run.folder.path} to train it again") from None


def write_table(output: Path, runs: Sequence[Run], jobs: int, as_json: bool = False) -> None:
    """Print and save the comparison. Students with labels are run on the validation images once more.

    Raises UserError if the runs were not validated by one metric.
    """
    config, scores = runs[0].config, {run: summary_of(run) for run in runs}
    metrics = {run.metric for run in scores.values()}
    if len(metrics) > 1:
        raise UserError(f"{output} holds runs that were validated by {' and '.join(sorted(metrics))}: no comparison")
    (metric,) = metrics
    result = _predicted(runs, scores) if metric == "top1" else {"rows": _rows(runs, scores, {}), "teacher": None}
    epochs = f"{config.schedule.epochs} epoch" + "s" * (config.schedule.epochs != 1)
    if config.schedule.patience is not None:
        epochs = f"at most {epochs}"
    device = choose_device(config.runtime.device)
    result |= {
        "metric": metric,
        "student": public_name(config.student.name),
        "data": config.data.source,
        "epochs": config.schedule.epochs,
        "command": f"irgdistill {shlex.join(sys.argv[1:])}",
        "device": f"{device}, {jobs} at once",
        "versions": {"irgdistill": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    _save(output, result, f"{result['student']} on {Path(str(config.data.source)).name}, {epochs}", as_json)


def _predicted(runs: Sequence[Run], scores: Mapping[Run, Scores]) -> dict[str, Any]:
    """Rows with differences and agreement, from what each student and the teacher predict on the validation images."""
    config = runs[0].config
    spec = config.teacher
    if config.teachers:
        Report().line(f"agreement is measured with the first of {len(config.all_teachers)} teachers")
    teacher = None
    if spec.checkpoint is not None or (spec.name is not None and spec.cache is None):
        teacher = build_teacher(spec)
    elif spec.cache is not None:
        Report().line(
            "agreement with the teacher is not measured: a cache has no weights to run; give --teacher-checkpoint"
        )
    students = {run: restore(run.folder.last)[0] for run in runs}
    student, device = students[runs[0]], choose_device(config.runtime.device)
    crop = student.input.covering(None if teacher is None else teacher.input)
    bad = UnreadableImages(config.data.max_bad_images, Report().warn)
    loader = eval_loader(open_splits(config.data, val_only=True), config.data, crop, device, bad)
    labels = torch.cat([labels.cpu() for _, labels in loader.epoch()])
    predicted = {run: _predict(network, loader, config.runtime.amp) for run, network in students.items()}
    taught = None
    if teacher is not None and teacher.num_classes == student.num_classes:
        taught = _predict(teacher, loader, config.runtime.amp)
    rows = _rows(runs, scores, {run: classes.eq(labels) for run, classes in predicted.items()})
    if taught is not None:
        for row in rows:
            same = [_percent(predicted[run].eq(taught)) for run in runs if run.config.method == row["method"]]
            row["agreement"], (row["agreement_mean"], row["agreement_std"]) = same, mean_and_deviation(same)
    return {
        "rows": rows,
        "teacher": None if teacher is None else teacher.name,
        "teacher_top1": None if taught is None else _percent(taught.eq(labels)),
        "validation_images": len(labels),
    }


@torch.no_grad()
def _predict(network: Network, loader: Loader, amp: str) -> Tensor:
    """Predicted classes (N,) of the images of a loader."""
    tapped = network.tapped(loader.device)
    with autocast(amp, loader.device):
        return torch.cat([tapped(images).logits.argmax(1).cpu() for images, _ in loader.epoch()])


def _percent(flags: Tensor) -> float:
    return float(100 * flags.double().mean())


def _save(output: Path, result: Mapping[str, Any], title: str, as_json: bool) -> None:
    rows, metric = result["rows"], result["metric"]
    columns, cells = _cells(rows, metric)
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    unequal = "" if all(row["seeds"] == seeds for row in rows) else " as far as they are finished"
    note = f"seeds {', '.join(map(str, seeds))}{unequal}: mean ± standard deviation after the last epoch and at best"
    if over := sorted({row["paired_over"] for row in rows if "difference" in row}, reverse=True):
        note += f"; from {BASELINE}: last epoch, ± half of the 95 % interval, paired over {over[0]}"
        note += ", or images where there is one" * (len(over) > 1)
    text = markdown_table([columns, *([markdown(name), *others] for name, *others in cells)])
    write_text(output / "compare.json", json.dumps(result, indent=1) + "\n")
    write_text(output / "compare.md", f"{markdown(title)}; {note}.\n\n{text}")
    write_text(output / "compare.csv", _csv(rows))
    picture = render(curves_figure(title, {row["method"]: row["curves"] for row in rows}, SELECTING[metric]), "png")
    write_atomically(output / "curves.png", lambda path: path.write_bytes(picture))
    if as_json:
        print(json.dumps(result))  # noqa: T201  the command's result
    else:
        table(title, columns, cells)
        Report(stdout=True).line(note)
    Report().line(f"saved in {output}: compare.json, compare.md, compare.csv, curves.png")


def _rows(runs: Sequence[Run], scores: Mapping[Run, Scores], right: Mapping[Run, Tensor]) -> list[dict[str, Any]]:
    """One row per method, in the order of the runs.

    `right`: which validation images (N,) are predicted correctly; nothing for runs without labels.
    """
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.config.method, []).append(run)
    rows = []
    for method, members in by_method.items():
        row: dict[str, Any] = {"method": method, "seeds": [run.config.seed for run in members]}
        losses = members[0].config.losses
        row["weights"] = {name: w for name, w in losses.weights().items() if w > 0}
        row["fades"] = {name: list(fade) for name, fade in losses.fades().items() if name in row["weights"]}
        for name, key in ((scores[members[0]].metric, "last"), ("best", "best")):
            row[name] = [getattr(scores[run], key) for run in members]
            row[f"{name}_mean"], row[f"{name}_std"] = mean_and_deviation(row[name])
        if method != BASELINE and BASELINE in by_method:
            row |= _difference(members, by_method[BASELINE], scores, right)
        for key in ("seconds", "images_per_second"):
            row[key] = mean_and_deviation([getattr(scores[run], key) for run in members])[0]
        row["curves"] = [_curve(run, scores[run]) for run in members]
        for run, curve in zip(members, row["curves"], strict=True):
            if None in curve:
                lacks = f"the {SELECTING[scores[run].metric]} of {curve.count(None)} of {len(curve)} epochs"
                Report().warn(f"{run.folder.metrics} lacks {lacks}: its curve has gaps")
        rows.append(row)
    return rows


def _difference(
    members: Sequence[Run],
    baseline: Sequence[Run],
    scores: Mapping[Run, Scores],
    right: Mapping[Run, Tensor],
) -> dict[str, Any]:
    """Difference of the last top-1 to the baseline's, paired over seeds, or over images for a single seed."""
    alone = {run.config.seed: run for run in baseline}
    pairs = [(run, alone[run.config.seed]) for run in members if run.config.seed in alone]
    if not pairs:
        return {}
    values, over = [scores[run].last - scores[other].last for run, other in pairs], "seeds"
    difference, _ = mean_and_deviation(values)
    if len(pairs) == 1:  # predicted again here: in low precision a few images may differ from the run's evaluation
        ours, theirs = (100 * right[run].double() for run in pairs[0])
        values, over = (ours - theirs).tolist(), "images"
    return {"difference": difference, "half_width_95": paired_interval(values)[1], "paired_over": over}


def _curve(run: Run, scores: Scores) -> list[float | None]:
    """The metric after each epoch; None where metrics.jsonl does not tell."""
    evaluations = (record for record in records(run.folder.metrics) if record["kind"] == "eval")
    found = {record.get("epoch"): record.get(scores.metric) for record in evaluations}
    values = (found.get(epoch) for epoch in range(1, scores.epochs + 1))
    return [value if isinstance(value, (int, float)) and 0 <= value <= 100 else None for value in values]


def _cells(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[str], list[list[str]]]:
    """The table as text: columns and rows."""
    title = f"{SELECTING[metric]} %"
    columns = ["method", "runs", title, "best %", f"from {BASELINE}", "agreement %", "seconds", "img/s"]

    def spread(row: Mapping[str, Any], name: str) -> str:
        if f"{name}_mean" not in row:
            return "–"
        deviation = row[f"{name}_std"]
        return f"{row[f'{name}_mean']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")

    cells = [
        [
            row["method"],
            str(len(row["seeds"])),
            spread(row, metric),
            spread(row, "best"),
            f"{row['difference']:+.2f} ± {row['half_width_95']:.2f}" if "difference" in row else "–",
            spread(row, "agreement"),
            f"{row['seconds']:.0f}",
            f"{row['images_per_second']:,.0f}",
        ]
        for row in rows
    ]
    shown = [i for i in range(len(columns)) if any(line[i] != "–" for line in cells)]
    return [columns[i] for i in shown], [[line[i] for i in shown] for line in cells]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The single numbers of the rows as CSV."""
    names = list(dict.fromkeys(key for row in rows for key, v in row.items() if not isinstance(v, (list, dict))))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(visible_values(row) for row in rows)
    return file.getvalue()
