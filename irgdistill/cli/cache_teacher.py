"""`irgdistill cache-teacher`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from irgdistill.cli.options import Quiet, command, option, options_of_distill
from irgdistill.config import DATA, RESULT


@command(
    "cache-teacher",
    order=60,
    refused=("resume", "previous_state", "overwrite", "dry_run", "gpus", "backend", "teacher_cache"),
    examples=[
        "irgdistill cache-teacher --teacher resnet50 --data ./imagenet --views 20 --output cache/resnet50",
        "irgdistill distill --teacher-cache cache/resnet50 --student mobilenetv2_100 --data ./imagenet",
    ],
)
def cache_teacher(
    context: typer.Context,
    views: Annotated[
        int | None, option(DATA, help="Augmented views of each image (default: data.views, or 1).", metavar="N")
    ] = None,
    store: Annotated[str, option(RESULT, help="Number format: fp16 (default) or fp32.", metavar="FORMAT")] = "fp16",
    logits: Annotated[
        str, option(RESULT, help="all (default), or how many of the largest to keep.", metavar="all|N")
    ] = "all",
    output: Annotated[
        Path, option(RESULT, help="Folder of the cache (default: runs/teacher-cache).", metavar="DIR")
    ] = Path("runs/teacher-cache"),
    quiet: Quiet = False,
) -> None:
    """Run the teacher once over every view of every training image.

    Takes the options of `distill` too. Students then train with `distill --teacher-cache DIR`, with no teacher in
    memory.
    """
    from irgdistill.commands.requests import CacheRequest

    config = options_of_distill(context).config()
    request = CacheRequest(config, output, views, store, logits)
    from irgdistill.commands.cache_teacher import cache_teacher as run
    from irgdistill.io import quiet_console

    with quiet_console(quiet):
        run(request)
