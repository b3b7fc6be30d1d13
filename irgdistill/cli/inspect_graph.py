"""`irgdistill inspect-graph`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from irgdistill.cli.options import CODE, Json, command, option, with_settings
from irgdistill.config import DATA, NETWORKS, RESULT, RUN, Flag


@command(
    "inspect-graph",
    order=50,
    examples=[
        "irgdistill inspect-graph runs/student --images 30 --terminal",
        "irgdistill inspect-graph --plan-only --teacher resnet50 --student mobilenetv2_100",
    ],
)
@with_settings(
    {
        "teacher.name": "timm name, or FILE.py:FUNCTION.",
        "teacher.checkpoint": "The teacher's weights; default: pretrained.",
        "teacher.input_size": "224 or 256x192.",
        "teacher.preprocessing.mean": None,
        "teacher.preprocessing.std": None,
        "teacher.preprocessing.interpolation": None,
        "teacher.preprocessing.crop_pct": None,
        "student.name": "timm name, or FILE.py:FUNCTION; untrained without weights.",
        "student.checkpoint": "The student's weights.",
        "student.pretrained": "Use the student's pretrained weights.",
        "student.input_size": "Size of the student's input.",
        "student.preprocessing.mean": None,
        "student.preprocessing.std": None,
        "student.preprocessing.interpolation": None,
        "student.preprocessing.crop_pct": None,
        "data.source": "Default: the data set of the checkpoint.",
        "data.root": None,
        "data.val_fraction": None,
        "data.max_bad_images": None,
        "seed": Flag("--seed", DATA, "Seed of the draw and of untrained weights."),
        "matching.levels": None,
        "matching.skip": None,
        "matching.taps_teacher": None,
        "matching.taps_student": None,
        "data.eval_batch_size": Flag("--batch-size", RUN, "Images per step (default: 64)."),
        "data.workers": Flag("--workers", RUN, "Loader processes."),
        "runtime.device": None,
        "plugins": CODE,
    }
)
def inspect_graph(
    given: dict[str, Any],
    target: Annotated[
        str | None,
        typer.Argument(metavar="RUN|CKPT", help="A student's run or checkpoint.", show_default=False),
    ] = None,
    compare: Annotated[
        str | None, option(NETWORKS, help="Another run or checkpoint of the same student.", metavar="RUN|CKPT")
    ] = None,
    split: Annotated[str, option(DATA, help="val (default) or train.", metavar="val|train")] = "val",
    images: Annotated[int, option(DATA, help="Images, drawn evenly over the classes (default: 64).", metavar="N")] = 64,
    neighbours: Annotated[
        int, option(RESULT, help="Nearest images to compare for each image (default: 5).", metavar="N")
    ] = 5,
    form: Annotated[
        str, option(RESULT, "--format", help="Format of the figures: png (default), svg or pdf.", metavar="FORMAT")
    ] = "png",
    terminal: Annotated[bool, option(RESULT, "--terminal", help="Also draw the heatmaps in the terminal.")] = False,
    output: Annotated[
        Path | None, option(RESULT, help="Folder; default: RUN/graphs or graphs/TEACHER-STUDENT.", metavar="DIR")
    ] = None,
    plan_only: Annotated[
        bool, option(RESULT, "--plan-only", help="Show which stages match; needs no data and no weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show which stages of two networks match, and how each network relates the same images to one another."""
    from irgdistill.commands.requests import InspectRequest
    from irgdistill.config import load_config

    config = load_config(flags={"data.eval_batch_size": 64, **given})
    request = InspectRequest(
        config,
        frozenset(given),
        target=target,
        compare=compare,
        images=images,
        split=split,
        neighbours=neighbours,
        format=form,
        terminal=terminal,
        output=output,
        plan_only=plan_only,
        as_json=as_json,
    )
    from irgdistill.commands.inspect.run import inspect

    inspect(request)
