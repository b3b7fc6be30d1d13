"""`irgdistill distill`"""

from __future__ import annotations

from typing import Any

from irgdistill.cli.options import Json, Quiet, command, with_settings
from irgdistill.cli.run import (
    Backend,
    DryRun,
    Gpus,
    Output,
    Overwrite,
    Preset,
    PreviousState,
    Resume,
    Set,
    start_or_resume,
)


@command(
    "distill",
    order=20,
    examples=[
        "irgdistill distill --teacher resnet50 --student mobilenetv2_100 --data ./imagenet",
        "irgdistill train --preset quickstart --model cifar_resnet20 --output runs/teacher",
        "irgdistill distill --preset quickstart --student cifar_resnet14_x0_5 --teacher-checkpoint runs/teacher "
        "--output runs/student",
    ],
)
@with_settings()
def distill(
    given: dict[str, Any],
    gpus: Gpus = None,
    backend: Backend = None,
    preset: Preset = None,
    settings: Set = None,
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    previous_state: PreviousState = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a student under a teacher.

    Stages are matched by spatial resolution; no layer names are needed.
    """
    from irgdistill.commands.requests import DistillRequest

    start_or_resume(
        DistillRequest,
        given,
        preset=preset,
        settings=settings,
        output=output,
        overwrite=overwrite,
        resume=resume,
        previous_state=previous_state,
        dry_run=dry_run,
        gpus=gpus,
        backend=backend,
        quiet=quiet,
        as_json=as_json,
    )
