"""`irgdistill export`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from irgdistill.cli.options import CODE, command, option, with_settings
from irgdistill.config import DATA, RESULT


@command(
    "export",
    order=70,
    examples=["irgdistill export runs/student --format onnx", "irgdistill export runs/student --format hub"],
)
@with_settings({"data.source": "Default: the data set of the checkpoint.", "data.root": None, "plugins": CODE})
def export(
    given: dict[str, Any],
    target: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="A student's run or checkpoint.")],
    form: Annotated[
        str,
        option(
            RESULT,
            "--format",
            help="hub (default): folder for timm and the Hub; onnx; program: torch.export; timm.",
            metavar="FORMAT",
        ),
    ] = "hub",
    output: Annotated[
        Path | None,
        option(RESULT, help="Default: hub, timm, NAME.onnx or NAME.pt2 beside the checkpoint.", metavar="PATH"),
    ] = None,
    overwrite: Annotated[bool, option(RESULT, "--overwrite", help="Replace what is there.")] = False,
    raw_input: Annotated[
        bool,
        option(RESULT, "--raw-input", help="onnx, program: take RGB in [0, 1]; default: images normalised as in timm."),
    ] = False,
    opset: Annotated[
        int | None, option(RESULT, help="ONNX opset, at least 18; default: torch's choice.", metavar="N")
    ] = None,
    push: Annotated[
        str | None, option(RESULT, help="Upload the folder to this repository on the Hub.", metavar="OWNER/NAME")
    ] = None,
    license_: Annotated[
        str | None,
        option(RESULT, "--license", help="License in the model card (default: apache-2.0).", metavar="LICENSE"),
    ] = None,
    check_images: Annotated[
        int,
        option(DATA, help="Validation images on which export and student must agree (default: 64).", metavar="N"),
    ] = 64,
) -> None:
    """Export the student: a folder for timm and the Hub, ONNX, torch.export, or plain timm weights."""
    from irgdistill.commands.requests import ExportRequest
    from irgdistill.config import load_config

    request = ExportRequest(
        target=target,
        format=form,
        output=output,
        overwrite=overwrite,
        push=push,
        license=license_,
        opset=opset,
        raw_input=raw_input,
        check_images=check_images,
        data=load_config(flags={**given, "data.workers": 0, "data.eval_batch_size": 64}).data,
        given=frozenset(given) - {"plugins"},
    )
    from irgdistill.commands.export.run import export as run

    run(request)
