"""`irgdistill distill`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from irgdistill.cli.completion import complete_preset, remember_names
from irgdistill.cli.options import Json, Quiet, command, option, with_settings
from irgdistill.config import RUN
from irgdistill.errors import UserError


@command(
    "distill",
    order=10,
    examples=[
        "irgdistill distill --teacher resnet50 --student mobilenetv2_100 --data ./imagenet",
        "irgdistill distill --preset quickstart --method none --student cifar_resnet20 --output runs/teacher",
        "irgdistill distill --preset quickstart --student cifar_resnet14_x0_5 --teacher-checkpoint runs/teacher "
        "--output runs/student",
    ],
)
@with_settings()
def distill(
    given: dict[str, Any],
    gpus: Annotated[str | None, option(RUN, "--gpus", help="Processes on this machine: a number, or all.")] = None,
    backend: Annotated[str | None, option(RUN, "--backend", help="nccl, or gloo to run on the CPU.")] = None,
    preset: Annotated[
        str | None, option(RUN, "--preset", help="Name of a preset, or a YAML file.", complete=complete_preset)
    ] = None,
    settings: Annotated[list[str] | None, option(RUN, "--set", help="Any key.path=value.")] = None,
    output: Annotated[Path | None, option(RUN, "--output", help="Run folder; default: a new one in runs/.")] = None,
    overwrite: Annotated[bool, option(RUN, "--overwrite", help="Replace the run that is there.")] = False,
    resume: Annotated[Path | None, option(RUN, "--resume", help="Resume the run of this folder.")] = None,
    previous_state: Annotated[
        bool, option(RUN, "--previous-state", help="Resume from the state before the last one.")
    ] = False,
    dry_run: Annotated[bool, option(RUN, "--dry-run", help="Show configuration and plan; train nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a student under a teacher (or alone: --method none).

    Stages are matched by spatial resolution; no layer names are needed.
    """
    if resume is not None:
        if preset or settings or output or overwrite or dry_run:
            raise UserError(
                "--resume uses the run's own configuration; "
                "leave out --preset, --set, --output, --overwrite and --dry-run"
            )
    elif previous_state:
        raise UserError("--previous-state needs --resume RUN: it selects the state from which that run resumes")
    from irgdistill.commands.requests import DistillRequest, ResumeRequest
    from irgdistill.config import load_config

    config = load_config(preset, settings, given)
    changes = {key: value for key, value in given.items() if key != "plugins"}  # imported now, wherever they are
    request = (
        DistillRequest(config, output, overwrite, gpus, backend)
        if resume is None
        else ResumeRequest(resume, changes, previous_state, gpus, backend)
    )
    from irgdistill.commands import distill as run
    from irgdistill.io import quiet_console

    remember_names()
    summary = None
    with quiet_console(quiet):
        if isinstance(request, ResumeRequest):
            summary = run.resume(request, own_process=True)
        elif dry_run:
            run.dry_run(config, as_json)
        else:
            summary = run.start(request, own_process=True)
    if as_json and summary is not None:
        typer.echo(json.dumps(summary))
