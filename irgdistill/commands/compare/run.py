"""`irgdistill compare`: train one recipe under several methods and seeds, then tabulate the results.

OUTPUT/METHOD/SEED           a run folder each, with log.txt where several ran at once
OUTPUT/compare.json .md .csv the table
OUTPUT/curves.png            validation top-1 by epoch
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irgdistill.commands.compare.table import Run, summary_of, write_table
from irgdistill.commands.compare.together import train_together
from irgdistill.commands.distill import resume, start
from irgdistill.commands.requests import CompareRequest, DistillRequest, ResumeRequest
from irgdistill.config import Config, changeable_on_resume, dump, of_any_teacher, read_yaml, validate_saved
from irgdistill.errors import Interrupted, UserError
from irgdistill.io import SELECTING, Report, RunFolder, write_text
from irgdistill.losses import build_loss
from irgdistill.matching import Tapped
from irgdistill.models import CheckpointMetadata
from irgdistill.runtime import Stopped, choose_device, cores, lifeline
from irgdistill.training import SharedInputs, changes, precision_of, prepare, resolved

POLL = 0.2
"""Seconds between two checks of the running processes."""


def compare(request: CompareRequest) -> None:
    """Train the runs that are missing, then print and save the table. Repeat it after an interruption.

    Raises UserError, before the first run if the error can be found by then.
    """
    runs, inputs = _planned_runs(request), SharedInputs()
    left = [run for run in runs if not run.folder.summary.exists()]
    for run in runs:
        if run not in left:
            summary_of(run)
    if request.finished:
        if left:
            Report().line(f"not finished: {'; '.join(run.name for run in left)}")
        runs, left = [run for run in runs if run not in left], []
        if not runs:
            raise UserError(f"--finished: {request.output} has no finished run of these methods and seeds")
    amp = _check(request, left, inputs) or runs[0].config.runtime.amp
    runs, left = ([run.with_precision(amp) for run in them] for them in (runs, left))
    try:
        if request.together:
            train_together(left, _changed(request), inputs)
        elif request.jobs == 1:
            for number, run in enumerate(left):
                Report().line(f"[{len(runs) - len(left) + number + 1}/{len(runs)}] {run.name}")
                _train(run, request, inputs)
        else:
            _train_at_once(left, request)
    except Stopped as stop:
        raise Interrupted(128 + stop.number, f"{stop}; repeat the command to continue") from None
    except Interrupted as stop:
        raise Interrupted(stop.code, f"{stop}; repeat the `compare` command to continue") from None
    write_table(request.output, runs, request.jobs, request.as_json)


def _planned_runs(request: CompareRequest) -> list[Run]:
    """All runs, seed by seed, so that an unfinished comparison covers all methods."""
    methods = list(dict.fromkeys(request.methods))
    first, precision = request.config(methods[0]).seed, _precision(request)
    return [
        Run(
            resolved(request.config(method, seed)).replaced({"runtime.amp": precision}),
            RunFolder(request.output / method / str(seed)),
        )
        for seed in range(first, first + request.seeds)
        for method in methods
    ]


def _precision(request: CompareRequest) -> str:
    """The precision of all runs: the one asked for; for `auto` that of runs that are there, if there are any."""
    asked = request.config(request.methods[0]).runtime.amp
    paths = sorted(request.output.glob("*/*/config.yaml"))
    there = [validate_saved(read_yaml(path), f"{path}: ").runtime.amp for path in paths]
    known = [amp for amp in there if amp != "auto"]
    return known[0] if asked == "auto" and known else asked


def _check(request: CompareRequest, left: Sequence[Run], inputs: SharedInputs) -> str | None:
    """Return what the precision of the first run is here; None if none is left.

    Raises UserError for the folder of another comparison, and for runs that cannot start.
    """
    paths = sorted(request.output.glob("*/*/config.yaml"))
    begun = [validate_saved(read_yaml(path), f"{path}: ") for path in paths]
    for there in begun:
        _check_same(request, resolved(request.config(there.method, there.seed)), there)
    teachers, amp = _teachers(request.output), None
    classified = dict[bool, str]()
    for config in {run.config.method: run.config for run in left}.values():
        setup = prepare(config, inputs=inputs)
        classified.setdefault(setup.student.num_classes > 0, config.method)
        if len(classified) > 1:
            raise UserError(
                f"without labels {classified[True]} trains a classifier, which is compared with the teacher's, and "
                f"{classified[False]} an encoder, whose neighbours are: compare them apart"
            )
        for there in begun:  # another version may have chosen another recipe
            recipe = {"optim": setup.config.optim, "schedule": setup.config.schedule}
            _check_same(request, there.replaced(recipe), there)
        for path, weights in teachers.items():
            if setup.checksums not in (None, weights):
                raise UserError(f"{path} learnt from a teacher with other weights; give another --output")
        booster = None if setup.booster is None else Tapped(setup.booster.model, setup.booster.preprocess())
        widths = [teacher.embedding_widths for teacher in setup.teachers] or [None]
        for plan, width in zip(setup.plans, widths, strict=True):
            build_loss(config.losses, plan, None, booster, embedding_widths=width)
        amp = amp or precision_of(setup, choose_device(config.runtime.device))
    return amp


def _check_same(request: CompareRequest, config: Config, there: Config) -> None:
    """Raises UserError if a run that is there has other settings."""
    if different := changes(config, there):
        what = "; ".join(different)
        raise UserError(f"{request.output} holds a comparison with other settings ({what}); give another --output")


def _teachers(output: Path) -> dict[Path, str | list[str]]:
    """Folder of each run that had a teacher -> checksum of the teacher's weights, or of each teacher's."""
    found = {path.parent: CheckpointMetadata.read(path) for path in sorted(output.glob("*/*/last.safetensors"))}
    checksums: dict[Path, str | list[str]] = {}
    for path, known in found.items():
        if known is not None and known.teacher:
            first = known.teacher.weights
            checksums[path] = [first, *(other.weights for other in known.teachers)] if known.teachers else first
    return checksums


# --- running ----------------------------------------------------------------------------------------------------------


def _train(run: Run, request: CompareRequest, inputs: SharedInputs) -> None:
    """Start or resume a run in this process."""
    try:
        if run.folder.state.exists():
            resume(ResumeRequest(run.folder.path, _changed(request)), own_process=True)
        else:
            start(DistillRequest(run.config, run.folder.path, overwrite=True), own_process=True, inputs=inputs)
    except UserError as error:
        raise UserError(f"{run.name}: {error}") from None


def _changed(request: CompareRequest) -> dict[str, Any]:
    """What a resumed run may change of its settings, as far as it is asked for."""
    changeable = changeable_on_resume()
    return {key: value for key, value in (request.flags or {}).items() if of_any_teacher(key) in changeable}


def _train_at_once(left: Sequence[Run], request: CompareRequest) -> None:
    """Run `irgdistill distill` in `request.jobs` processes at a time. A run that fails stops the others."""
    waiting, running = list(left), dict[Run, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < request.jobs:
                run = waiting.pop(0)
                running[run] = _launch(run, request)
                Report().line(f"{run.name}: {run.folder.path / 'log.txt'}")
            time.sleep(POLL)
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    _finish(run, process.returncode)
    finally:
        _stop(list(running.values()))


def _launch(run: Run, request: CompareRequest) -> subprocess.Popen[bytes]:
    """Start or resume a run in a process of its own session, which ends with this one: Ctrl-C is passed on."""
    folder = run.folder.path
    folder.mkdir(parents=True, exist_ok=True)
    if run.folder.state.exists():
        options = ["--resume", str(folder), *request.moved]
    else:
        recipe = folder.with_suffix(".yaml")
        write_text(recipe, dump(run.config))
        options = ["--preset", str(recipe), "--output", str(folder), "--overwrite"]
    threads = max(1, cores() // request.jobs)
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "irgdistill", "distill", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads), **os.environ, **lifeline()},
            start_new_session=True,
        )


def _finish(run: Run, code: int) -> None:
    if code:
        lines = (run.folder.path / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise Interrupted(code if code > 0 else 128 - code, f"{run.name} ended with code {code}: {last}")
    scores = summary_of(run)
    Report().line(f"{run.name}: {SELECTING[scores.metric]} {scores.last:.2f}, best {scores.best:.2f}")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop the processes, which save first. A second signal kills them."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    try:
        for process in processes:
            process.wait()
    except Stopped:
        for process in processes:
            process.kill()
        raise
