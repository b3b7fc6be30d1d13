"""The same recipe under several methods and seeds: runs what is missing, then one table, with its spread.

OUTPUT/METHOD/SEED           a run folder each, with log.txt where several ran at once
OUTPUT/compare.json .md .csv the table
OUTPUT/curves.png            validation top-1 by epoch
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from irgdistill import __version__
from irgdistill.checkpoint import RunFolder, restore
from irgdistill.config import METHODS, MOVABLE, Config, dump, load_config, read_yaml, validate
from irgdistill.data import BadImages, Loader, eval_loader
from irgdistill.errors import Interrupted, UserError, nearest
from irgdistill.files import write_atomically, write_text
from irgdistill.losses import build_loss
from irgdistill.models import Network
from irgdistill.plot import curves_figure, render
from irgdistill.report import Report, table
from irgdistill.run import resume, start
from irgdistill.setup import autocast, build_teacher, choose_device, prepare, with_absolute_paths
from irgdistill.signals import Stopped
from irgdistill.sources import open_splits
from irgdistill.state import changes
from irgdistill.statistics import mean_and_deviation, paired_interval
from irgdistill.taps import Tapped

BASELINE = "none"
POLL = 0.2
"""Seconds between two looks at the runs at work."""


@dataclass(frozen=True)
class Request:
    """What to compare, as the command line says it."""

    methods: Sequence[str]
    seeds: int
    output: Path
    jobs: int = 1
    """Runs at work at once, on one device."""
    preset: str | None = None
    settings: Sequence[str] = ()
    flags: Mapping[str, Any] | None = None
    moved: Sequence[str] = ()
    """Options of `distill` that may also be given to a run that goes on."""

    def config(self, method: str, seed: int | None = None) -> Config:
        """Of one run. A weight that is set holds for the methods that have its term; the others stay without it."""
        others = {term for terms in METHODS.values() for term in terms} - set(METHODS[method])
        flags = {**(self.flags or {}), "method": method, **{f"losses.{name}.weight": 0.0 for name in others}}
        if seed is not None:
            flags["seed"] = seed
        return with_absolute_paths(load_config(self.preset, list(self.settings), flags))


@dataclass(frozen=True, eq=False)
class Run:
    """One method under one seed."""

    config: Config
    folder: RunFolder

    @property
    def name(self) -> str:
        return f"{self.config.method}, seed {self.config.seed}"


def compare(request: Request) -> None:
    """Train what is not trained yet, then print and save the table. The same call goes on after an interruption.

    Raises UserError before the first run for whatever can be known by then.
    """
    runs = _plan(request)
    left = [run for run in runs if not run.folder.summary.exists()]
    _check(request, left)
    try:
        if request.jobs == 1:
            for number, run in enumerate(left):
                Report().line(f"[{len(runs) - len(left) + number + 1}/{len(runs)}] {run.name}")
                _train(run, request)
        else:
            _train_together(left, request)
    except Stopped as stop:
        raise Interrupted(128 + stop.number, f"{stop}; the same command goes on") from None
    except Interrupted as stop:
        raise Interrupted(stop.code, f"{stop}; the same `compare` goes on with all") from None
    _tell(request, runs)


def _plan(request: Request) -> list[Run]:
    """All runs, seed by seed, so that an unfinished comparison is a fair one. Raises UserError."""
    if request.seeds < 1 or request.jobs < 1:
        raise UserError(f"--seeds {request.seeds} --jobs {request.jobs}: both must be at least 1")
    for method in request.methods:
        if method not in METHODS:
            raise UserError(f"unknown method {method!r}{nearest(method, METHODS)} (known: {', '.join(METHODS)})")
    methods = list(dict.fromkeys(request.methods))
    if not methods:
        raise UserError("--methods names no method")
    first = request.config(methods[0]).seed
    return [
        Run(request.config(method, seed), RunFolder(request.output / method / str(seed)))
        for seed in range(first, first + request.seeds)
        for method in methods
    ]


def _check(request: Request, left: Sequence[Run]) -> None:
    """Refuse another comparison's folder, and runs that could not start. Raises UserError."""
    for path in sorted(request.output.glob("*/*/config.yaml")):
        there = validate(read_yaml(path), f"{path}: ")
        if different := changes(request.config(there.method, there.seed), there):
            what = "; ".join(different)
            raise UserError(f"{request.output} holds a comparison with other settings ({what}); give another --output")
    for config in {run.config.method: run.config for run in left}.values():
        setup = prepare(config)
        booster = None if setup.booster is None else Tapped(setup.booster.model, setup.booster.view())
        build_loss(config.losses, setup.plan, None, booster)


# --- running ----------------------------------------------------------------------------------------------------------


def _train(run: Run, request: Request) -> None:
    """In this process, from the beginning or from where it stands."""
    try:
        if run.folder.state.exists():
            resume(run.folder.path, {key: value for key, value in (request.flags or {}).items() if key in MOVABLE})
        else:
            start(run.config, run.folder.path, True, None, None)
    except UserError as error:
        raise UserError(f"{run.name}: {error}") from None


def _train_together(left: Sequence[Run], request: Request) -> None:
    """As `irgdistill distill` in processes of their own, `request.jobs` at a time. One that fails stops the others."""
    waiting, working = list(left), dict[Run, subprocess.Popen[bytes]]()
    try:
        while waiting or working:
            while waiting and len(working) < request.jobs:
                run = waiting.pop(0)
                working[run] = _launch(run, request)
                Report().line(f"{run.name}: {run.folder.path / 'log.txt'}")
            time.sleep(POLL)
            for run, process in list(working.items()):
                if process.poll() is not None:
                    del working[run]
                    _done(run, process.returncode)
    finally:
        _stop(list(working.values()))


def _launch(run: Run, request: Request) -> subprocess.Popen[bytes]:
    """Start a run, apart from this one's terminal: Ctrl-C is for this process to pass on."""
    folder = run.folder.path
    folder.mkdir(parents=True, exist_ok=True)
    if run.folder.state.exists():
        options = ["--resume", str(folder), *request.moved]
    else:
        recipe = folder.with_suffix(".yaml")
        write_text(recipe, dump(run.config))
        options = ["--preset", str(recipe), "--output", str(folder), "--overwrite"]
    threads = max(1, len(os.sched_getaffinity(0)) // request.jobs)
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "irgdistill", "distill", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
        )


def _done(run: Run, code: int) -> None:
    if code:
        lines = (run.folder.path / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no word")
        raise Interrupted(code if code > 0 else 128 - code, f"{run.name} ended with code {code}: {last}")
    summary = json.loads(run.folder.summary.read_text(encoding="utf-8"))
    Report().line(f"{run.name}: top-1 {summary['last_top1']:.2f}, best {summary['top1']:.2f}")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let all save and end; a second signal ends them at once."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    try:
        for process in processes:
            process.wait()
    except Stopped:
        for process in processes:
            process.kill()
        raise


# --- the table --------------------------------------------------------------------------------------------------------


def _tell(request: Request, runs: Sequence[Run]) -> None:
    """Compare what the students say of the validation images, then print and save."""
    config = runs[0].config
    named = config.teacher.name is not None or config.teacher.checkpoint is not None
    teacher = build_teacher(config) if named else None
    students = {run: restore(run.folder.last)[0] for run in runs}
    student, device = students[runs[0]], choose_device(config.runtime.device)
    size = student.size if teacher is None else max(student.size, teacher.size)
    how, bad = (size, student.interpolation, student.crop_pct), BadImages(config.data.max_bad_images, Report().warn)
    loader = eval_loader(open_splits(config.data, val_only=True), config.data, *how, device, bad)
    labels = torch.cat([labels.cpu() for _, labels in loader.epoch()])
    predicted = {run: _predict(network, loader, config.runtime.amp) for run, network in students.items()}
    taught = None
    if teacher is not None and teacher.num_classes == student.num_classes:
        taught = _predict(teacher, loader, config.runtime.amp)
    rows = _rows(runs, {run: classes.eq(labels) for run, classes in predicted.items()})
    if taught is not None:
        for row in rows:
            same = [_percent(predicted[run].eq(taught)) for run in runs if run.config.method == row["method"]]
            row["agreement"], (row["agreement_mean"], row["agreement_std"]) = same, mean_and_deviation(same)
    result = {
        "rows": rows,
        "teacher": None if teacher is None else teacher.name,
        "teacher_top1": None if taught is None else _percent(taught.eq(labels)),
        "student": config.student.name,
        "data": config.data.source,
        "validation_images": len(labels),
        "epochs": config.schedule.epochs,
        "command": f"irgdistill {shlex.join(sys.argv[1:])}",
        "device": f"{device}, {request.jobs} at once",
        "versions": {"irgdistill": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    epochs = f"{config.schedule.epochs} epoch" + "s" * (config.schedule.epochs > 1)
    _save(request.output, result, f"{student.name} on {Path(str(config.data.source)).name}, {epochs}")


@torch.no_grad()
def _predict(network: Network, loader: Loader, amp: str) -> Tensor:
    """Classes that a network names for the images of a loader (N,)."""
    tapped = Tapped(network.model.to(loader.device), network.view().to(loader.device)).eval()
    with autocast(amp, loader.device):
        return torch.cat([tapped(images).logits.argmax(1).cpu() for images, _ in loader.epoch()])


def _percent(flags: Tensor) -> float:
    return float(100 * flags.double().mean())


def _save(output: Path, result: Mapping[str, Any], title: str) -> None:
    rows = result["rows"]
    columns, cells = _cells(rows)
    note = f"seeds {', '.join(map(str, rows[0]['seeds']))}: mean ± standard deviation after the last epoch and at best"
    if over := next((row["paired_over"] for row in rows if "difference" in row), None):
        note += f"; from {BASELINE}: last epoch, ± half of the 95 % interval, paired over {over}"
    lines = [columns, ["---"] * len(columns), *cells]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    write_text(output / "compare.json", json.dumps(result, indent=1) + "\n")
    write_text(output / "compare.md", f"{title}; {note}.\n\n{text}")
    write_text(output / "compare.csv", _csv(rows))
    picture = render(curves_figure(title, {row["method"]: row["curves"] for row in rows}), "png")
    write_atomically(output / "curves.png", lambda path: path.write_bytes(picture))
    table(title, columns, cells)
    Report(stdout=True).line(note)
    Report().line(f"saved in {output}: compare.json, compare.md, compare.csv, curves.png")


def _rows(runs: Sequence[Run], right: Mapping[Run, Tensor]) -> list[dict[str, Any]]:
    """One for each method, in the order asked for. `right`: which validation images (N,) a run's student names."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.config.method, []).append(run)
    summaries = {run: json.loads(run.folder.summary.read_text(encoding="utf-8")) for run in runs}
    rows = []
    for method, members in by_method.items():
        row: dict[str, Any] = {"method": method, "seeds": [run.config.seed for run in members]}
        row["weights"] = {name: w for name, w in members[0].config.losses.weights().items() if w > 0}
        for name, key in (("top1", "last_top1"), ("best", "top1")):
            row[name] = [summaries[run][key] for run in members]
            row[f"{name}_mean"], row[f"{name}_std"] = mean_and_deviation(row[name])
        if method != BASELINE and BASELINE in by_method:
            row |= _difference(members, by_method[BASELINE], summaries, right)
        for key in ("seconds", "images_per_second"):
            row[key] = mean_and_deviation([summaries[run][key] for run in members])[0]
        row["curves"] = [_curve(run) for run in members]
        rows.append(row)
    return rows


def _difference(
    members: Sequence[Run],
    baseline: Sequence[Run],
    summaries: Mapping[Run, Mapping[str, Any]],
    right: Mapping[Run, Tensor],
) -> dict[str, Any]:
    """Last top-1 less that of the student alone, paired over seeds, or over validation images where there is one."""
    pairs = list(zip(members, baseline, strict=True))
    values, over = [summaries[run]["last_top1"] - summaries[other]["last_top1"] for run, other in pairs], "seeds"
    if len(pairs) == 1:
        ours, theirs = (100 * right[run].double() for run in pairs[0])
        values, over = (ours - theirs).tolist(), "images"
    mean, half = paired_interval(values)
    return {"difference": mean, "half_width_95": half, "paired_over": over}


def _curve(run: Run) -> list[float]:
    records = map(json.loads, run.folder.metrics.read_text(encoding="utf-8").splitlines())
    return [record["top1"] for record in records if record["kind"] == "eval"]


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table as text: columns and rows."""
    columns = ["method", "top-1 %", "best %", f"from {BASELINE}", "agreement %", "seconds", "images/s"]

    def spread(row: Mapping[str, Any], name: str) -> str:
        if f"{name}_mean" not in row:
            return "–"
        deviation = row[f"{name}_std"]
        return f"{row[f'{name}_mean']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")

    cells = [
        [
            row["method"],
            spread(row, "top1"),
            spread(row, "best"),
            f"{row['difference']:+.2f} ± {row['half_width_95']:.2f}" if "difference" in row else "–",
            spread(row, "agreement"),
            f"{row['seconds']:.0f}",
            f"{row['images_per_second']:,.0f}",
        ]
        for row in rows
    ]
    return columns, cells


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The numbers of the rows; no lists."""
    names = list(dict.fromkeys(key for row in rows for key, v in row.items() if not isinstance(v, (list, dict))))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
