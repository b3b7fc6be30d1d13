"""`irgdistill predict`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from irgdistill.cli.options import CODE, Quiet, command, option, with_settings
from irgdistill.config import NETWORKS, RESULT, RUN, Flag


@command(
    "predict",
    order=90,
    examples=[
        "irgdistill predict runs/student ./photos --output classes.csv",
        "irgdistill predict runs/student ./photos --top 3 --json",
    ],
)
@with_settings(
    {
        "student.input_size": "224 or 256x192.",
        "data.max_bad_images": "Unreadable images to skip; default: any number.",
        "data.eval_batch_size": Flag("--batch-size", RUN, "Images per step."),
        "data.workers": Flag("--workers", RUN, "Loader processes."),
        "runtime.device": None,
        "runtime.amp": None,
        "plugins": CODE,
    }
)
def predict(
    given: dict[str, Any],
    target: Annotated[str, typer.Argument(metavar="NETWORK", help="Run, checkpoint, timm name or FILE.py:FUNCTION.")],
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Image files, folders of them at any depth, lists (.csv, .tsv, .txt)."),
    ],
    checkpoint: Annotated[Path | None, option(NETWORKS, help="Weights for a timm name.", metavar="FILE")] = None,
    top: Annotated[
        int, option(RESULT, help="Classes per image, the most probable first (default: 1).", metavar="N")
    ] = 1,
    output: Annotated[Path | None, option(RESULT, help="File to write; default: stdout.", metavar="FILE")] = None,
    overwrite: Annotated[bool, option(RESULT, "--overwrite", help="Replace the file that is there.")] = False,
    as_json: Annotated[bool, option(RESULT, "--json", help="Write a JSON object a line; default: CSV.")] = False,
    quiet: Quiet = False,
) -> None:
    """Class and probability of each image, as CSV or JSON.

    File names are exact, also those that are not UTF-8. Unreadable images are named, counted and left out.
    """
    from irgdistill.commands.image_requests import PredictRequest
    from irgdistill.config import load_config

    config = load_config(flags=given)
    request = PredictRequest(target, images, config, frozenset(given), checkpoint, top, output, overwrite, as_json)
    from irgdistill.commands.predict import predict as run
    from irgdistill.io import quiet_console

    with quiet_console(quiet):
        run(request)
