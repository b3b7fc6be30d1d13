"""`irgdistill embed`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from irgdistill.cli.options import CODE, Quiet, command, option, with_settings
from irgdistill.config import NETWORKS, RESULT, RUN, Flag


@command(
    "embed",
    order=80,
    examples=[
        "irgdistill embed runs/student --data ./photos --output photos.safetensors",
        "irgdistill embed resnet50 --data ./photos --output resnet50.safetensors",
    ],
)
@with_settings(
    {
        "student.input_size": "224 or 256x192.",
        "data.source": "Image folder of any structure, .tar, {names}.",
        "data.root": None,
        "data.download": None,
        "data.max_bad_images": "Unreadable images to skip; default: any number.",
        "data.eval_batch_size": Flag("--batch-size", RUN, "Images per step."),
        "data.workers": Flag("--workers", RUN, "Loader processes."),
        "runtime.device": None,
        "runtime.amp": None,
        "teacher.pooling": Flag(
            "--pooling", NETWORKS, "Of tokens: cls, mean or cls+mean; default: the network's own.", metavar="POOLING"
        ),
        "plugins": CODE,
    }
)
def embed(
    given: dict[str, Any],
    target: Annotated[str, typer.Argument(metavar="NETWORK", help="Run, checkpoint, timm name or FILE.py:FUNCTION.")],
    output: Annotated[
        Path, option(RESULT, "--output", help="File to write: .safetensors or .parquet.", metavar="FILE")
    ],
    checkpoint: Annotated[Path | None, option(NETWORKS, help="Weights for a timm name.", metavar="FILE")] = None,
    overwrite: Annotated[bool, option(RESULT, "--overwrite", help="Replace the file that is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Embeddings of all images of a folder: the pooled features before the classifier.

    File names are exact, also those that are not UTF-8. Unreadable images are named, counted and left out.
    """
    from irgdistill.commands.image_requests import EmbedRequest
    from irgdistill.config import load_config

    request = EmbedRequest(target, load_config(flags=given), output, frozenset(given), checkpoint, overwrite)
    from irgdistill.commands.embed import embed as run
    from irgdistill.io import quiet_console

    with quiet_console(quiet):
        run(request)
