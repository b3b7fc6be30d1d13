"""`irgdistill train`"""

from __future__ import annotations

from typing import Any

from irgdistill.cli.options import PREPROCESSING, Json, Quiet, command, with_settings
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
from irgdistill.config import NETWORKS, Flag
from irgdistill.errors import UserError


@command(
    "train",
    order=10,
    examples=[
        "irgdistill train --preset quickstart --model cifar_resnet20",
        "irgdistill train --preset finetune-small-data --model resnet50 --pretrained --data ./flowers",
    ],
)
@with_settings(
    {
        "student.name": Flag(
            "--model",
            NETWORKS,
            "timm name, hf-hub:…, local-dir:… or FILE.py:FUNCTION.",
            completion="network",
            metavar="TIMM-NAME",
            common=True,
        ),
        "student.pretrained": Flag("--pretrained", NETWORKS, "Start from timm's pretrained weights.", common=True),
        "student.checkpoint": Flag(
            "--checkpoint",
            NETWORKS,
            "Start from these weights: a run, .safetensors or .pth.",
            metavar="RUN|FILE",
            common=True,
        ),
        "student.input_size": "224 or 256x192; default: the network's own.",
        **PREPROCESSING,
        "losses.ce.label_smoothing": None,
    },
    others=True,
    without=("teacher.", "matching.", "losses.", "method", "data.labels", "runtime.graph_scope"),
)
def train(
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
    """Train or fine-tune a network on labels, such as a teacher.

    The run is like that of a student: eval, export and --teacher-checkpoint take it.
    """
    from irgdistill.commands.requests import TrainRequest
    from irgdistill.config import TERMS

    hints = [name for name, term in TERMS.items() if term.compares != {"labels"}]
    of_teacher = ("method=", "teacher.", "matching.", *(f"losses.{name}." for name in hints))
    for setting in settings or ():
        if setting.strip().startswith(of_teacher):
            raise UserError(f"train has no teacher: leave out --set {setting}, or use irgdistill distill")
    start_or_resume(
        TrainRequest,
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
        fixed={"method": "none", **{f"losses.{name}.weight": 0.0 for name in hints}},  # as in compare, of any preset
    )
