"""`irgdistill doctor`"""

from __future__ import annotations

from pathlib import Path

import typer

from irgdistill.cli.options import Json, command, options_of_distill


@command(
    "doctor",
    order=120,
    refused=("resume", "previous_state", "overwrite", "dry_run", "quiet"),
    examples=["irgdistill doctor", "irgdistill doctor --preset quickstart --method none --student cifar_resnet20"],
)
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Show this machine's resources, and with the options of `distill` whether that run fits.

    Reports what slows the run down, too. Exit code 1: it does not fit.
    """
    from irgdistill.commands.requests import DoctorRequest

    distill = options_of_distill(context)
    output = distill["output"] or Path("runs")
    request = DoctorRequest(distill.config(), bool(context.args), output, distill["gpus"], distill["backend"], as_json)
    from irgdistill.commands.doctor.report import diagnose

    if not diagnose(request):
        raise typer.Exit(1)
