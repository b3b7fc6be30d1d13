"""`irgdistill compare`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from irgdistill.cli.completion import complete_method
from irgdistill.cli.options import Json, Quiet, command, option, options_of_distill
from irgdistill.config import METHOD, RESULT, RUN, TRAINING


@command(
    "compare",
    order=30,
    refused=("method", "resume", "previous_state", "overwrite", "dry_run", "gpus", "backend"),
    examples=[
        "irgdistill compare --teacher resnet50 --student resnet18 --data ./imagenet --batch-size 256",
        "irgdistill compare --preset quickstart --methods none,irg+kd+at --seeds 2 --student cifar_resnet14_x0_5 "
        "--teacher-checkpoint runs/teacher --output runs/digits",
    ],
)
def compare(
    context: typer.Context,
    methods: Annotated[
        str,
        option(METHOD, help="Methods (default: none,kd,irg+kd+at).", metavar="A,B,C", complete=complete_method),
    ] = "none,kd,irg+kd+at",
    seeds: Annotated[int, option(TRAINING, help="Runs of each method, from --seed on (default: 3).", metavar="N")] = 3,
    jobs: Annotated[int, option(RUN, help="Runs at once on one device (default: 1).", metavar="N")] = 1,
    together: Annotated[
        bool,
        option(RUN, "--together", help="Train the methods of a seed in turns: images and teacher are read once."),
    ] = False,
    output: Annotated[
        Path, option(RUN, help="Folder of the runs and tables (default: runs/compare).", metavar="DIR")
    ] = Path("runs/compare"),
    finished: Annotated[
        bool, option(RESULT, "--finished", help="Train nothing; make the table of the finished runs.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train one student by several methods and seeds, and make one table.

    Takes the options of `distill` too. Finished runs are skipped, unfinished ones are resumed.
    """
    from irgdistill.commands.requests import CompareRequest
    from irgdistill.config import options

    distill = options_of_distill(context)
    moved = [
        (setting.flag.name, str(value))
        for name, setting in options().items()
        if setting.flag and setting.changeable and setting.key != "runtime.loggers" and distill[name] is not None
        for value in (distill[name] if setting.flag.repeated else [distill[name]])
    ]
    request = CompareRequest(
        methods=[name for name in methods.replace(" ", "").split(",") if name],
        seeds=seeds,
        output=output,
        jobs=jobs,
        together=together,
        preset=distill["preset"],
        settings=distill.settings,
        flags=distill.given,
        moved=[word for pair in moved for word in pair],
        as_json=as_json,
        finished=finished,
    )
    from irgdistill.commands.compare.run import compare as run
    from irgdistill.io import quiet_console

    with quiet_console(quiet):
        run(request)
