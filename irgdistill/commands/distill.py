"""Training from the command line: begun or gone on with, in one process or many; what could be matched."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from irgdistill.commands.inspect.graph_images import RunLogger
from irgdistill.commands.requests import DistillRequest, ResumeRequest
from irgdistill.config import Config, dump, validate
from irgdistill.errors import Interrupted, UserError
from irgdistill.io import Report, RunFolder
from irgdistill.matching import print_plan
from irgdistill.runtime import Stopped, World, process_group, restart_count, run_workers, world_size
from irgdistill.training import Parts, Setup, Trainer, check_processes, open_state, position, prepare, resolved, score


def dry_run(config: Config, as_json: bool = False) -> None:
    """Print the resolved configuration and the matching; check everything that can be checked without training."""
    setup = prepare(config)
    Parts(setup, Report(quiet=True), World())
    if as_json:
        plan = None if setup.plan is None else setup.plan.to_dict()
        values = {"config": setup.config.model_dump(mode="json"), "plan": plan, "start": setup.start}
        print(json.dumps(values))  # noqa: T201  the command's result
        return
    print_plan(setup.plan)
    Report().line(str(setup.splits))
    if setup.start:
        Report().line(setup.start)
    print(dump(setup.config), end="")  # noqa: T201  the command's result


def start(request: DistillRequest) -> dict[str, Any] | None:
    """Train from the beginning, in a new folder; in `gpus` processes of this machine, or among those of torchrun.

    The summary and the `folder` in the process that leads the run; None in others.
    """
    restarted = restart_count() > 0
    config = _on_backend(resolved(request.config), request.backend)
    folder = RunFolder(request.output or _next_folder(config, last=restarted))
    if not restarted:
        folder.check_inputs(
            {
                "--teacher-checkpoint": config.teacher.checkpoint,
                "--student-checkpoint": config.student.checkpoint,
            }
        )
    with _says_where_it_stands(folder, begun=False):
        setup = _ready(config, request.gpus, request.backend)
        if setup is None:
            return None
        with process_group(config.runtime.device, request.backend) as world:
            folder = RunFolder(world.broadcast(folder.path))
            if world.broadcast(restarted and folder.state.exists()):
                return _go_on(folder, setup, world, open_state(folder)[0])
            trainer = Trainer(setup, folder, Report(folder.metrics, quiet=not world.main), world)
            if world.main:
                print_plan(setup.plan)
            trainer.report.line(str(setup.splits))
            if setup.start:
                trainer.report.line(setup.start)
            trainer.report.line(f"run folder {folder.path}")
            _tell(trainer)
            trainer.start(request.overwrite or restarted)
            return _finish(trainer)


def _ready(config: Config, gpus: str | None, backend: str | None, begun: bool = False) -> Setup | None:
    """What this process trains with; None: workers were started, and have done it. Raises UserError before that."""
    setup, workers = prepare(config, begun), _workers(config, gpus, backend)
    check_processes(config, setup.splits, workers or world_size())
    if not workers:
        return setup
    del setup
    run_workers(workers, sys.argv[1:])
    return None


def _on_backend(config: Config, backend: str | None) -> Config:
    """The configuration on the device that the backend needs: gloo runs on the CPU."""
    return config.replaced({"runtime.device": "cpu"}) if backend == "gloo" else config


def _workers(config: Config, gpus: str | None, backend: str | None) -> int:
    """How many processes to start here; 0: none, this is one of them. Raises UserError."""
    there = torch.cuda.device_count()
    if backend == "nccl" and not there:
        raise UserError("--backend nccl: there is no GPU here; --backend gloo runs the processes on the CPU")
    if gpus is None or world_size() > 1:
        return 0
    if config.runtime.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {config.runtime.device} is one device; with --gpus leave it out, or give cpu or cuda"
        )
    on_cpu = backend == "gloo" or config.runtime.device == "cpu"
    count = there if gpus == "all" else int(gpus)
    if count == 0 or (count > there and not on_cpu):
        raise UserError(f"--gpus {gpus}: there are {there} GPUs here; --backend gloo runs the processes on the CPU")
    return count if count > 1 else 0


def _tell(trainer: Trainer) -> None:
    """How many processes train, and what a relation spans."""
    world, runtime, batch = trainer.world, trainer.config.runtime, trainer.config.data.batch_size
    if world.size > 1:
        spans = f"all {batch}" if runtime.graph_scope == "global" else f"the {batch // world.size} of each process"
        statistics = "synchronised" if runtime.sync_bn else "averaged every epoch"
        trainer.report.line(
            f"{world.size} processes share batches of {batch} images; relations span {spans}; "
            f"batch-norm statistics are {statistics}"
        )


def resume(request: ResumeRequest) -> dict[str, Any] | None:
    """Go on where the state in a run folder stands; returns what `start` does. Raises UserError."""
    folder = RunFolder(request.path)
    with _says_where_it_stands(folder, begun=True):
        state, config = open_state(folder, request.previous)
        tree = config.model_dump()
        for key, value in request.changes.items():
            section, name = key.split(".")
            tree[section][name] = value
        setup = _ready(_on_backend(validate(tree), request.backend), request.gpus, request.backend, begun=True)
        if setup is None:
            return None
        with process_group(setup.config.runtime.device, request.backend) as world:
            return _go_on(folder, setup, world, state, request.previous)


def _go_on(
    folder: RunFolder, setup: Setup, world: World, state: dict[str, Any], previous: bool = False
) -> dict[str, Any] | None:
    if world.main:
        folder.lock()
    trainer = Trainer(setup, folder, Report(folder.metrics, quiet=not world.main), world)
    trainer.resume(state, previous)
    trainer.report.line(f"resuming {folder.path} at {position(state)} of {trainer.batches}")
    _tell(trainer)
    return _finish(trainer)


@contextmanager
def _says_where_it_stands(folder: RunFolder, begun: bool) -> Iterator[None]:
    """A signal that ends everything at once still says what is left; a state from before a run began is another's."""
    before = folder.state.stat().st_mtime_ns if folder.state.exists() and not begun else None
    try:
        yield
    except Stopped as stop:
        left = "nothing was trained yet"
        if folder.state.exists() and folder.state.stat().st_mtime_ns != before:
            left = f"what was saved is safe; go on with: {folder.resume_command}"
        raise Interrupted(128 + stop.number, f"{stop}; {left}") from None


def _finish(trainer: Trainer) -> dict[str, Any] | None:
    if trainer.world.main and trainer.config.runtime.loggers:
        trainer.observers = [RunLogger(trainer.setup, trainer.folder.path, trainer.report, trainer.update)]
    summary = trainer.fit()
    trainer.report.result(
        f"best {score(summary)} at epoch {summary['epoch']} of {summary['epochs']}, "
        f"{summary['seconds']:.0f} s of training, {summary['images_per_second']:,.0f} images/s: {trainer.folder.best}"
    )
    return {**summary, "folder": str(trainer.folder.path)} if trainer.world.main else None


def _next_folder(config: Config, last: bool = False) -> Path:
    """The first free name under runs/; `last`: the one before it."""
    name = f"{config.student.name}-{config.method}".replace("+", "-").replace("/", "-").replace(":", "-")
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path.with_name(f"{name}-{max(number - last, 1)}")
