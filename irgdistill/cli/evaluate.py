"""`irgdistill eval`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from irgdistill.cli.options import CODE, PREPROCESSING, Json, command, option, with_settings
from irgdistill.config import METHOD, NETWORKS, RUN, Flag


@command(
    "eval",
    order=40,
    examples=[
        "irgdistill eval runs/student",
        "irgdistill eval runs/student --against runs/teacher --json",
        "irgdistill eval runs/student --probe knn",
    ],
)
@with_settings(
    {
        "student.input_size": "224 or 256x192.",
        **PREPROCESSING,
        "teacher.preprocessing.mean": None,
        "teacher.preprocessing.std": None,
        "data.source": "Default: the data set of the checkpoint.",
        "data.root": None,
        "data.val_fraction": None,
        "data.max_bad_images": None,
        "data.eval_batch_size": Flag("--batch-size", RUN, "Images per step."),
        "data.workers": Flag("--workers", RUN, "Loader processes."),
        "runtime.device": None,
        "runtime.amp": None,
        "plugins": CODE,
    }
)
def evaluate(
    given: dict[str, Any],
    targets: Annotated[
        list[str],
        typer.Argument(metavar="NETWORK", help="Run, checkpoint, timm name or FILE.py:FUNCTION; several: a table."),
    ],
    checkpoint: Annotated[Path | None, option(NETWORKS, help="Weights for a timm name.", metavar="FILE")] = None,
    against: Annotated[
        str | None, option(NETWORKS, help="Teacher: run, checkpoint, timm name or FILE.py:FUNCTION.", metavar="NETWORK")
    ] = None,
    against_checkpoint: Annotated[
        Path | None, option(NETWORKS, help="Weights for the teacher's timm name.", metavar="FILE")
    ] = None,
    probe: Annotated[
        str | None,
        option(
            METHOD,
            help="Classify by the embeddings: knn, or linear; fitted to the training images.",
            metavar="knn|linear",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Accuracy, calibration, size and speed of a network."""
    from irgdistill.commands.image_requests import EvalRequest
    from irgdistill.config import load_config

    config = load_config(flags=given)
    request = EvalRequest(targets, config, frozenset(given), checkpoint, against, against_checkpoint, as_json, probe)
    from irgdistill.commands.evaluate import evaluate_targets

    evaluate_targets(request)
