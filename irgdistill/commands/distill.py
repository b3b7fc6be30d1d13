"""`irgdistill distill`: start or resume a run, in one process or several; print what it would do (`--dry-run`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irgdistill.commands.inspect.graph_images import RunLogger
from irgdistill.commands.outcome import show_outcome
from irgdistill.commands.requests import DistillRequest, ResumeRequest
from irgdistill.config import AUTO, Config, architecture_of, assign, dump, is_remote, split_function, validate
from irgdistill.errors import Interrupted, UserError
from irgdistill.io import Report, RunFolder
from irgdistill.matching import print_plan
from irgdistill.runtime import (
    Stopped,
    World,
    choose_device,
    is_worker,
    keep_memory,
    process_group,
    restart_count,
    run_workers,
    world_size,
)
from irgdistill.training import (
    SavedState,
    Setup,
    SharedInputs,
    SharedParts,
    Trainer,
    build_components,
    build_trainer,
    check_processes,
    on_backend,
    open_state,
    prepare,
    resolved,
    score,
)


def dry_run(config: Config, as_json: bool = False) -> None:
    """Print the resolved configuration and the matching, after all checks that need no training."""
    setup = prepare(config)
    build_components(setup, World(), Report(quiet=True))
    if as_json:
        plans = [None if plan is None else plan.to_dict() for plan in setup.plans]
        values: dict[str, Any] = {
            "config": setup.config.model_dump(mode="json"),
            "plan": plans[0],
            "start": setup.start_note,
        }
        if len(plans) > 1:
            values["plans"] = plans
        print(json.dumps(values))  # noqa: T201  the command's result
        return
    _print_plans(setup)
    for line in setup.notes:
        Report().line(line)
    print(dump(setup.config), end="")  # noqa: T201  the command's result


def _print_plans(setup: Setup) -> None:
    """Print the matching with each teacher."""
    for number, plan in enumerate(setup.plans):
        if len(setup.teachers) > 1 and plan is not None:
            Report().line(f"teacher {number + 1}: {setup.teachers[number].network.name}")
        print_plan(plan)


def start(
    request: DistillRequest,
    own_process: bool = False,
    inputs: SharedInputs | None = None,
    outcome: bool = False,
) -> dict[str, Any] | None:
    """Train from the beginning in a new folder, in `gpus` processes of this machine or those of torchrun.

    `own_process`: the process belongs to this run, so its settings may change for good. `inputs`: data and teacher that
    other runs use too. `outcome`: print teacher and student side by side at the end. Returns the summary and the
    `folder` in the first process, None in others. Raises UserError for what cannot work, before training where
    possible.
    """
    restarted = restart_count() > 0
    config = on_backend(resolved(request.config), request.backend)
    folder = RunFolder(request.output or _next_folder(config, last=restarted))
    if not restarted:
        folder.check_inputs(request.inputs)
    with _explain_stop(folder, resuming=False):
        setup = _checked_setup(config, request.gpus, request.backend, inputs=inputs)
        if setup is None:
            return None
        with process_group(config.runtime.device, request.backend) as world:
            folder = RunFolder(world.broadcast(folder.path))
            if world.broadcast(restarted and folder.state.exists()):
                return _resume(folder, setup, world, open_state(folder)[0], False, own_process, outcome)
            trainer = begin(setup, folder, _report(folder, world), request.overwrite or restarted, world)
            return _train(trainer, folder, own_process, outcome)


def begin(
    setup: Setup,
    folder: RunFolder,
    report: Report,
    overwrite: bool = False,
    world: World | None = None,
    shared: SharedParts | None = None,
) -> Trainer:
    """A trainer of a new run, ready to train. Raises UserError."""
    trainer = build_trainer(setup, folder, report, world, shared)
    if world is not None and world.main:
        _print_plans(setup)
    for line in (*setup.notes, f"run folder {folder.path}"):
        report.line(line)
    _report_world(trainer)
    trainer.start(overwrite)
    return trainer


def resume(request: ResumeRequest, own_process: bool = False, outcome: bool = False) -> dict[str, Any] | None:
    """Resume the run in a folder from its saved state; takes and returns what `start` does. Raises UserError.

    The state is trusted as the options typed at its start are: data and networks that it names are looked up on the
    network where they are not here, data after a line that says so. A folder from elsewhere needs `--data`.
    """
    folder = RunFolder(request.path)
    with _explain_stop(folder, resuming=True):
        state, config = open_state(folder, request.previous)
        config = on_backend(with_changes(config, request.changes), request.backend)
        if config.data.source and is_remote(config.data.source):
            Report(quiet=is_worker()).line(f"{request.path} reads {config.data.source} from the network")
        setup = _checked_setup(config, request.gpus, request.backend, resuming=True)
        if setup is None:
            return None
        with process_group(setup.config.runtime.device, request.backend) as world:
            return _resume(folder, setup, world, state, request.previous, own_process, outcome)


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration of a run to resume, with other values of some keys. Raises UserError."""
    tree = config.model_dump()
    for key, value in changes.items():
        assign(tree, key, value)
    return validate(tree)


def _resume(
    folder: RunFolder,
    setup: Setup,
    world: World,
    state: SavedState,
    previous: bool,
    own_process: bool,
    outcome: bool,
) -> dict[str, Any] | None:
    trainer = reopen(setup, folder, _report(folder, world), state, previous, world)
    return _train(trainer, folder, own_process, outcome)


def reopen(
    setup: Setup,
    folder: RunFolder,
    report: Report,
    state: SavedState,
    previous: bool = False,
    world: World | None = None,
    shared: SharedParts | None = None,
) -> Trainer:
    """A trainer of the run in `folder`, ready to go on from `state`. Raises UserError."""
    if world is None or world.main:
        folder.lock()
    setup = replace(setup, config=_with_saved_precision(setup.config, state))
    trainer = build_trainer(setup, folder, report, world, shared)
    trainer.checkpointer.resume(state, previous)
    report.line(f"resuming {folder.path} at {state.position} of {trainer.components.batches}")
    _report_world(trainer)
    return trainer


def _with_saved_precision(config: Config, state: SavedState) -> Config:
    """The configuration with the precision in which the run was trained so far."""
    amp = state.config.get("runtime", {}).get("amp", "auto")
    if amp == "auto":  # version 0.1 saved it as it was asked for, and knew these two
        amp = "bf16" if choose_device(config.runtime.device).type == "cuda" else "none"
    return config.replaced({"runtime.amp": amp})


def _report(folder: RunFolder, world: World) -> Report:
    return Report(folder.metrics, quiet=not world.main)


def _train(trainer: Trainer, folder: RunFolder, own_process: bool, outcome: bool) -> dict[str, Any] | None:
    if own_process:
        keep_memory(trainer.components.device)
    if trainer.world.main and trainer.config.runtime.loggers:
        setup, update = trainer.components.setup, trainer.progress.update
        trainer.observers = [RunLogger(setup, folder.path, trainer.report, update)]
    summary = trainer.fit()
    result = (
        f"best {score(summary)} at epoch {summary['epoch']} of {summary['epochs']}, "
        f"{summary['seconds']:.0f} s of training, {summary['images_per_second']:,.0f} images/s"
    )
    if trainer.config.schedule.epochs == 0:
        result = f"nothing trained (--epochs 0), {score(summary)} with the initial weights"
    trainer.report.result(f"{result}: {folder.best}")
    if not trainer.world.main:
        return None
    if outcome:
        show_outcome(trainer, folder.path)
    return {**summary, "folder": str(folder.path)}


# --- processes --------------------------------------------------------------------------------------------------------


def _checked_setup(
    config: Config,
    gpus: str | None,
    backend: str | None,
    resuming: bool = False,
    inputs: SharedInputs | None = None,
) -> Setup | None:
    """The setup for this process to train; None if workers were started and have trained it. Raises UserError."""
    setup, workers = prepare(config, resuming, inputs=inputs), _workers(config, gpus, backend)
    check_processes(config, setup.splits, workers or world_size())
    if not workers:
        return setup
    del setup  # its networks would take memory while the workers train
    run_workers(workers, sys.argv[1:])
    return None


def _workers(config: Config, gpus: str | None, backend: str | None) -> int:
    """Number of processes to start on this machine; 0 to train in this one. Raises UserError."""
    found = torch.cuda.device_count()
    if backend == "nccl" and not found:
        raise UserError("--backend nccl: there is no GPU here; --backend gloo runs the processes on the CPU")
    if gpus is None or world_size() > 1:
        return 0
    if config.runtime.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {config.runtime.device} is one device; with --gpus leave it out, or give cpu or cuda"
        )
    on_cpu = backend == "gloo" or config.runtime.device == "cpu"
    count = found if gpus == "all" else int(gpus)
    if count == 0 or (count > found and not on_cpu):
        raise UserError(f"--gpus {gpus}: there are {found} GPUs here; --backend gloo runs the processes on the CPU")
    return count if count > 1 else 0


def _report_world(trainer: Trainer) -> None:
    """Print the number of processes, and what a relation spans."""
    world, runtime, batch = trainer.world, trainer.config.runtime, trainer.config.data.batch_size
    if world.size > 1:
        spans = f"all {batch}" if runtime.graph_scope == "global" else f"the {batch // world.size} of each process"
        statistics = "synchronised" if runtime.sync_bn else "averaged every epoch"
        trainer.report.line(
            f"{world.size} processes share batches of {batch} images; relations span {spans}; "
            f"batch-norm statistics are {statistics}"
        )


@contextmanager
def _explain_stop(folder: RunFolder, resuming: bool) -> Iterator[None]:
    """Add to a signal that ends the run at once what is saved. A state from before a new run began is another run's."""
    before = folder.state.stat().st_mtime_ns if folder.state.exists() and not resuming else None
    try:
        yield
    except Stopped as stop:
        left = "nothing was trained yet"
        if folder.state.exists() and folder.state.stat().st_mtime_ns != before:
            left = f"what was saved is safe; resume with: {folder.resume_command}"
        raise Interrupted(128 + stop.number, f"{stop}; {left}") from None


def _next_folder(config: Config, last: bool = False) -> Path:
    """The first free name under runs/; `last`: the one before it."""
    student = str(config.student.name)
    named = student if split_function(student) is None else architecture_of(student)
    parts = [named] + [config.method] * (config.method not in (AUTO, "none"))
    name = "-".join(parts).replace("+", "-").replace("/", "-").replace(":", "-")
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path.with_name(f"{name}-{max(number - last, 1)}")
