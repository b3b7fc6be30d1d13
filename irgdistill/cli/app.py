"""Command line: one thin function per command; an error is one line on stderr and exit code 2. Starts without torch."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from irgdistill.cli.completion import complete_method, complete_network, complete_preset, remember_names
from irgdistill.cli.options import (
    DATA,
    MATCHING,
    METHOD,
    NETWORKS,
    RESULT,
    RUNTIME,
    TRAINING,
    Command,
    Commands,
    examples,
    option,
    options_of_distill,
    settings_of,
    usage,
)
from irgdistill.cli.tools import doctor, evaluate, export, inspect_graph, models, presets
from irgdistill.config import FLAGS
from irgdistill.errors import Interrupted, UserError
from irgdistill.runtime import Signals, Stopped, report_failure
from irgdistill.version import __version__

app = typer.Typer(
    name="irgdistill",
    cls=Commands,
    help="Distil any timm teacher into any timm student with Instance Relationship Graphs.",
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=examples("irgdistill distill --preset quickstart --method none --student cifar_resnet20"),
)


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For a command that takes the options of `distill` too."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"irgdistill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command(
    cls=Command,
    epilog=examples(
        "irgdistill distill --teacher resnet50 --student mobilenetv2_100 --data ./imagenet",
        "irgdistill distill --preset quickstart --method none --student cifar_resnet20 --output runs/teacher",
        "irgdistill distill --preset quickstart --student cifar_resnet14_x0_5 --teacher-checkpoint runs/teacher "
        "--output runs/student",
    ),
)
def distill(
    teacher: Annotated[
        str | None, option(NETWORKS, help="timm name, hf-hub:… or local-dir:…", complete=complete_network)
    ] = None,
    teacher_checkpoint: Annotated[
        Path | None, option(NETWORKS, help="Weights (.safetensors, .pth); one of ours names its network.")
    ] = None,
    teacher_input_size: Annotated[
        str | None, option(NETWORKS, help="224 or 256x192; default: the teacher's own.")
    ] = None,
    teacher_cache: Annotated[Path | None, option(NETWORKS, help="What `cache-teacher` wrote, in its place.")] = None,
    student: Annotated[
        str | None, option(NETWORKS, help="timm name of the network to train.", complete=complete_network)
    ] = None,
    student_pretrained: Annotated[
        bool | None, option(NETWORKS, "--student-pretrained", help="Start from its pretrained weights.")
    ] = None,
    student_checkpoint: Annotated[
        Path | None, option(NETWORKS, help="Start from these weights: a run, .safetensors or .pth.")
    ] = None,
    input_size: Annotated[str | None, option(NETWORKS, help="Student's; default: its own.")] = None,
    skip_teacher_check: Annotated[
        bool, option(NETWORKS, "--skip-teacher-check", help="Train even if the teacher is near chance.")
    ] = False,
    data: Annotated[str | None, option(DATA, help="Image folder, .tar, digits, or torch/…, hfds/…, wds/….")] = None,
    data_root: Annotated[Path | None, option(DATA, help="Where a named data set keeps its files.")] = None,
    download: Annotated[bool | None, option(DATA, "--download", help="Fetch a named data set.")] = None,
    val_fraction: Annotated[float | None, option(DATA, help="Hold out this share for validation.")] = None,
    balanced: Annotated[bool | None, option(DATA, "--balanced", help="Draw every class equally often.")] = None,
    no_labels: Annotated[bool, option(DATA, "--no-labels", help="Any images; all is learnt from the teacher.")] = False,
    max_bad_images: Annotated[int | None, option(DATA, help="Unreadable images to skip (10).")] = None,
    batch_size: Annotated[int | None, option(DATA, help="Images per step, the graph's size (128).")] = None,
    workers: Annotated[int | None, option(DATA, help="Loader processes (1); the result is the same.")] = None,
    levels: Annotated[int | None, option(MATCHING, help="Match by depth, in at most so many stages.")] = None,
    skip_level: Annotated[list[int] | None, option(MATCHING, help="Leave out /N; may be repeated.")] = None,
    taps_teacher: Annotated[str | None, option(MATCHING, help="Blocks that end the stages: NAME,NAME.")] = None,
    taps_student: Annotated[str | None, option(MATCHING, help="Blocks that end the stages: NAME,NAME.")] = None,
    method: Annotated[
        str | None,
        option(METHOD, help="irg+kd+at (default), irg+kd, mtk, irg, none, kd, at, …", complete=complete_method),
    ] = None,
    kd_weight: Annotated[float | None, option(METHOD, help="Soft targets.")] = None,
    logits_weight: Annotated[float | None, option(METHOD, help="Logit regression.")] = None,
    edges_weight: Annotated[float | None, option(METHOD, help="Edge matrices of the last stage.")] = None,
    transform_weight: Annotated[float | None, option(METHOD, help="Transformations of all stages.")] = None,
    temperature: Annotated[float | None, option(METHOD, help="Of the soft targets (4).")] = None,
    edge_blocks: Annotated[int | None, option(METHOD, help="1: one-to-one; K: one-to-many.")] = None,
    label_smoothing: Annotated[float | None, option(METHOD, help="Of the labels (0).")] = None,
    epochs: Annotated[int | None, option(TRAINING, help="Passes over the training images (100).")] = None,
    warmup_epochs: Annotated[float | None, option(TRAINING, help="Linear warm-up (0).")] = None,
    opt: Annotated[str | None, option(TRAINING, help="timm optimizer (sgd).")] = None,
    lr: Annotated[float | None, option(TRAINING, help="Peak learning rate (0.1).")] = None,
    weight_decay: Annotated[float | None, option(TRAINING, help="Not of biases and norms (5e-4).")] = None,
    clip_grad: Annotated[float | None, option(TRAINING, help="Maximum gradient norm.")] = None,
    accumulate: Annotated[int | None, option(TRAINING, help="Batches per update (1).")] = None,
    ema: Annotated[float | None, option(TRAINING, help="Decay of averaged weights, such as 0.999.")] = None,
    mixup: Annotated[float | None, option(TRAINING, help="Alpha of mixup (0).")] = None,
    cutmix: Annotated[float | None, option(TRAINING, help="Alpha of cutmix (0).")] = None,
    auto_augment: Annotated[str | None, option(TRAINING, help="timm policy, such as rand-m9-mstd0.5.")] = None,
    seed: Annotated[int | None, option(TRAINING, help="Weights, order and augmentation (0).")] = None,
    device: Annotated[str | None, option(RUNTIME, help="auto, cpu, cuda, cuda:1, ….")] = None,
    amp: Annotated[str | None, option(RUNTIME, help="auto, none, bf16 or fp16.")] = None,
    channels_last: Annotated[bool | None, option(RUNTIME, "--channels-last", help="Memory layout.")] = None,
    compile_: Annotated[bool | None, option(RUNTIME, "--compile", help="Use torch.compile.")] = None,
    gpus: Annotated[str | None, option(RUNTIME, help="Processes on this machine: a number, or all.")] = None,
    backend: Annotated[str | None, option(RUNTIME, help="nccl, or gloo to run them on the CPU.")] = None,
    sync_bn: Annotated[bool | None, option(RUNTIME, "--sync-bn", help="Batch-norm over all processes.")] = None,
    graph_scope: Annotated[str | None, option(RUNTIME, help="global (default), or local to a process.")] = None,
    log: Annotated[list[str] | None, option(RUNTIME, help="tensorboard or wandb; may be repeated.")] = None,
    save_every_steps: Annotated[int | None, option(RUNTIME, help="Save after so many updates too.")] = None,
    save_every_minutes: Annotated[float | None, option(RUNTIME, help="Save after so many minutes too.")] = None,
    preset: Annotated[
        str | None, option(RUNTIME, help="Name of a preset, or a YAML file.", complete=complete_preset)
    ] = None,
    settings: Annotated[list[str] | None, option(RUNTIME, "--set", help="Any key.path=value.")] = None,
    output: Annotated[Path | None, option(RUNTIME, help="Run folder (a new one in runs/).")] = None,
    overwrite: Annotated[bool, option(RUNTIME, "--overwrite", help="Replace the run that is there.")] = False,
    resume: Annotated[Path | None, option(RUNTIME, help="Go on with this run folder.")] = None,
    previous_state: Annotated[
        bool, option(RUNTIME, "--previous-state", help="Resume from the state before the last one.")
    ] = False,
    dry_run: Annotated[bool, option(RUNTIME, "--dry-run", help="Show configuration and plan; stop.")] = False,
    quiet: Annotated[bool, option(RESULT, "--quiet", help="Say results, warnings and errors only.")] = False,
    as_json: Annotated[bool, option(RESULT, "--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Train a student under a teacher (or alone: --method none).

    Stages are matched by spatial resolution; no layer names are needed.
    """
    given = settings_of(locals())
    if resume is not None:
        if preset or settings or output or overwrite or dry_run:
            raise UserError(
                "--resume goes on with the run's own configuration; "
                "leave out --preset, --set, --output, --overwrite and --dry-run"
            )
    elif previous_state:
        raise UserError("--previous-state says where --resume RUN goes on from; there is no --resume")
    from irgdistill.commands.requests import DistillRequest, ResumeRequest
    from irgdistill.config import load_config

    config = load_config(preset, settings, given)
    request = (
        DistillRequest(config, output, overwrite, gpus, backend)
        if resume is None
        else ResumeRequest(resume, given, previous_state, gpus, backend)
    )
    from irgdistill.commands import distill as run
    from irgdistill.io import quiet_console

    remember_names()
    summary = None
    with quiet_console(quiet):
        if isinstance(request, ResumeRequest):
            summary = run.resume(request)
        elif dry_run:
            run.dry_run(config, as_json)
        else:
            summary = run.start(request)
    if as_json and summary is not None:
        typer.echo(json.dumps(summary))


@app.command(
    cls=Command,
    context_settings=PASSED_ON,
    epilog=examples(
        "irgdistill compare --teacher resnet50 --student resnet18 --data ./imagenet --batch-size 256",
        "irgdistill compare --preset quickstart --methods none,irg+kd+at --seeds 2 --student cifar_resnet14_x0_5 "
        "--teacher-checkpoint runs/teacher --output runs/digits",
    ),
)
def compare(
    context: typer.Context,
    methods: Annotated[
        str, option(METHOD, help="Of `distill`, with commas (none,kd,irg+kd+at).", complete=complete_method)
    ] = "none,kd,irg+kd+at",
    seeds: Annotated[int, option(TRAINING, help="Runs of each method, from --seed on (3).")] = 3,
    jobs: Annotated[int, option(RUNTIME, help="Runs at once on one device (1).")] = 1,
    output: Annotated[Path, option(RUNTIME, help="Its run folders and tables (runs/compare).")] = Path("runs/compare"),
    finished: Annotated[
        bool, option(RESULT, "--finished", help="Train nothing; the table of the runs that are finished.")
    ] = False,
    quiet: Annotated[bool, option(RESULT, "--quiet", help="Say results, warnings and errors only.")] = False,
    as_json: Annotated[bool, option(RESULT, "--json", help="Print the table as one JSON object.")] = False,
) -> None:
    """Train one student by several methods and seeds, and make one table. Takes the options of `distill` too.

    What is finished is skipped, what is not goes on.
    """
    from irgdistill.commands.requests import CompareRequest
    from irgdistill.config import MOVABLE

    refused = ("method", "no_labels", "resume", "previous_state", "overwrite", "dry_run", "gpus", "backend")
    options = options_of_distill(context, "compare", refused)
    movable = {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in options.items()
        if FLAGS.get(name) in MOVABLE - {"runtime.loggers"} and value is not None
    }
    request = CompareRequest(
        methods=[name for name in methods.replace(" ", "").split(",") if name],
        seeds=seeds,
        output=output,
        jobs=jobs,
        preset=options["preset"],
        settings=list(options["settings"] or ()),
        flags=settings_of(options),
        moved=[word for pair in movable.items() for word in pair],
        as_json=as_json,
        finished=finished,
    )
    from irgdistill.commands.compare.run import compare as run
    from irgdistill.io import quiet_console

    with quiet_console(quiet):
        run(request)


@app.command(
    cls=Command,
    name="cache-teacher",
    context_settings=PASSED_ON,
    epilog=examples(
        "irgdistill cache-teacher --teacher resnet50 --data ./imagenet --views 20 --output cache/resnet50",
        "irgdistill distill --teacher-cache cache/resnet50 --student mobilenetv2_100 --data ./imagenet",
    ),
)
def cache_teacher(
    context: typer.Context,
    views: Annotated[int | None, option(DATA, help="Augmented views of each image (data.views, or 1).")] = None,
    store: Annotated[str, option(RESULT, help="Numbers as fp16 (default) or fp32.")] = "fp16",
    logits: Annotated[str, option(RESULT, help="all (default), or how many of the largest.")] = "all",
    output: Annotated[Path, option(RESULT, help="Its folder (runs/teacher-cache).")] = Path("runs/teacher-cache"),
    quiet: Annotated[bool, option(RESULT, "--quiet", help="Say results, warnings and errors only.")] = False,
) -> None:
    """Run the teacher once over every view of every training image. Takes the options of `distill` too.

    Students then train with `distill --teacher-cache FOLDER`, with no teacher in memory.
    """
    from irgdistill.commands.requests import CacheRequest
    from irgdistill.config import load_config

    refused = ("resume", "previous_state", "overwrite", "dry_run", "gpus", "backend", "teacher_cache")
    options = options_of_distill(context, "cache-teacher", refused)
    config = load_config(options["preset"], list(options["settings"] or ()), settings_of(options))
    request = CacheRequest(config, output, views, store, logits)
    from irgdistill.commands.cache_teacher import cache_teacher as run
    from irgdistill.io import quiet_console

    with quiet_console(quiet):
        run(request)


app.command(
    cls=Command,
    name="inspect-graph",
    epilog=examples(
        "irgdistill inspect-graph runs/student --images 30 --terminal",
        "irgdistill inspect-graph --plan-only --teacher resnet50 --student mobilenetv2_100",
    ),
)(inspect_graph)


app.command(
    cls=Command,
    epilog=examples("irgdistill export runs/student --format onnx", "irgdistill export runs/student --format hub"),
)(export)


app.command(cls=Command, epilog=examples("irgdistill models 'cifar_resnet*'"))(models)


app.command(
    cls=Command,
    name="eval",
    epilog=examples("irgdistill eval runs/student", "irgdistill eval runs/student --against runs/teacher --json"),
)(evaluate)


app.command(
    cls=Command,
    context_settings=PASSED_ON,
    epilog=examples(
        "irgdistill doctor",
        "irgdistill doctor --preset quickstart --method none --student cifar_resnet20",
    ),
)(doctor)


app.command(cls=Command, epilog=examples("irgdistill presets", "irgdistill presets quickstart > mine.yaml"))(presets)


USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""click's UsageError, wherever this version of typer keeps it."""


def main() -> None:
    """Entry point: runs the app, turns our errors into one line and an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with Signals():
            sys.exit(app(prog_name="irgdistill", standalone_mode=False) or 0)
    except USAGE_ERROR as error:
        _die(usage(error), 2)
    except UserError as error:
        _die(str(error), 2)
    except OSError as error:
        _die(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 2)
    except Stopped as stop:
        _die(str(stop), 128 + stop.number)
    except Interrupted as error:
        _die(str(error), error.code)
    except Exception as error:
        if not report_failure(f"{type(error).__name__}: {error}\n{traceback.format_exc()}", 1):
            raise
        sys.exit(1)


def _die(message: str, code: int) -> None:
    """Say why and leave; of the processes of a run only one speaks."""
    if not report_failure(message, code) and os.environ.get("RANK", "0") == "0":
        typer.echo(f"irgdistill: {message}", err=True)
    sys.exit(code)
