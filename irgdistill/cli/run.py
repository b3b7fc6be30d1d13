"""Options of the commands that train, `distill` and `train`, beside the settings, and what both do with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from irgdistill.cli.completion import complete_preset, remember_names
from irgdistill.cli.options import RARE, option
from irgdistill.config import RUN
from irgdistill.errors import UserError

if TYPE_CHECKING:
    from irgdistill.commands.requests import DistillRequest

Gpus = Annotated[
    str | None, option(RUN, "--gpus", help="Processes on this machine: a number, or all.", metavar="N|all")
]


Backend = Annotated[
    str | None, option(RUN, "--backend", help="nccl, or gloo to run on the CPU.", metavar="nccl|gloo"), RARE
]


Preset = Annotated[
    str | None,
    option(RUN, "--preset", help="Name of a preset, or a YAML file.", metavar="NAME|FILE", complete=complete_preset),
]


Set = Annotated[list[str] | None, option(RUN, "--set", help="Any key.path=value.", metavar="KEY=VALUE")]


Output = Annotated[Path | None, option(RUN, "--output", help="Run folder; default: a new one in runs/.", metavar="DIR")]


Overwrite = Annotated[bool, option(RUN, "--overwrite", help="Replace the run that is there."), RARE]


Resume = Annotated[Path | None, option(RUN, "--resume", help="Resume the run of this folder.", metavar="RUN")]


PreviousState = Annotated[
    bool, option(RUN, "--previous-state", help="Resume from the state before the last one."), RARE
]


DryRun = Annotated[bool, option(RUN, "--dry-run", help="Show configuration and plan; train nothing.")]


def start_or_resume(
    kind: type[DistillRequest],
    given: dict[str, Any],
    *,
    preset: str | None,
    settings: list[str] | None,
    output: Path | None,
    overwrite: bool,
    resume: Path | None,
    previous_state: bool,
    dry_run: bool,
    gpus: str | None,
    backend: str | None,
    quiet: bool,
    as_json: bool,
    fixed: Mapping[str, Any] | None = None,
) -> None:
    """Train a new run, a request of `kind`, or resume one. Raises UserError for options that do not go together.

    `fixed`: settings of a new run that no option changes.
    """
    if resume is not None:
        if preset or settings or output or overwrite or dry_run:
            raise UserError(
                "--resume uses the run's own configuration; "
                "leave out --preset, --set, --output, --overwrite and --dry-run"
            )
    elif previous_state:
        raise UserError("--previous-state needs --resume RUN: it selects the state from which that run resumes")
    from irgdistill.commands.requests import ResumeRequest
    from irgdistill.config import load_config

    config = load_config(preset, settings, {**given, **(fixed or {})})
    changes = {key: value for key, value in given.items() if key != "plugins"}  # imported now, wherever they are
    request = (
        kind(config, output, overwrite, gpus, backend)
        if resume is None
        else ResumeRequest(resume, changes, previous_state, gpus, backend)
    )
    from irgdistill.commands import distill as run
    from irgdistill.io import quiet_console

    remember_names()
    summary = None
    with quiet_console(quiet):
        if isinstance(request, ResumeRequest):
            summary = run.resume(request, own_process=True, outcome=not quiet)
        elif dry_run:
            run.dry_run(config, as_json)
        else:
            summary = run.start(request, own_process=True, outcome=not quiet)
    if as_json and summary is not None:
        typer.echo(json.dumps(summary))
