"""`irgdistill doctor`"""

from __future__ import annotations

from pathlib import Path

import typer

from irgdistill.cli.options import Json, command, options_of_distill

REFUSED = ("resume", "previous_state", "overwrite", "dry_run", "quiet")


@command(
    "doctor",
    order=80,
    passes_on=True,
    examples=["irgdistill doctor", "irgdistill doctor --preset quickstart --method none --student cifar_resnet20"],
)
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Show this machine's resources; with the options of `distill`, whether that run fits and what slows it down.

    Exit code 1: it does not fit.
    """
    from irgdistill.commands.requests import DoctorRequest

    distill = options_of_distill(context, "doctor", REFUSED)
    output = distill["output"] or Path("runs")
    request = DoctorRequest(distill.config(), bool(context.args), output, distill["gpus"], distill["backend"], as_json)
    from irgdistill.commands.doctor.report import diagnose

    if not diagnose(request):
        raise typer.Exit(1)
