"""Command line: one thin function per command; an error is one line on stderr and exit code 2. Starts without torch."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from irgdistill import __version__
from irgdistill.errors import Interrupted, UserError, leave_word
from irgdistill.signals import Signals, Stopped

app = typer.Typer(
    name="irgdistill",
    help="Distil any timm teacher into any timm student with Instance Relationship Graphs.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

FLAGS = {
    "teacher": "teacher.name",
    "teacher_checkpoint": "teacher.checkpoint",
    "teacher_input_size": "teacher.input_size",
    "teacher_cache": "teacher.cache",
    "student": "student.name",
    "input_size": "student.input_size",
    "data": "data.source",
    "data_root": "data.root",
    "download": "data.download",
    "val_fraction": "data.val_fraction",
    "balanced": "data.balanced",
    "max_bad_images": "data.max_bad_images",
    "batch_size": "data.batch_size",
    "workers": "data.workers",
    "levels": "matching.levels",
    "skip_level": "matching.skip",
    "taps_teacher": "matching.taps_teacher",
    "taps_student": "matching.taps_student",
    "method": "method",
    "kd_weight": "losses.kd.weight",
    "logits_weight": "losses.logits.weight",
    "edges_weight": "losses.edges.weight",
    "transform_weight": "losses.transform.weight",
    "temperature": "losses.kd.temperature",
    "edge_blocks": "losses.edges.blocks",
    "label_smoothing": "losses.ce.label_smoothing",
    "epochs": "schedule.epochs",
    "warmup_epochs": "schedule.warmup_epochs",
    "opt": "optim.name",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "clip_grad": "optim.clip_grad",
    "accumulate": "optim.accumulate",
    "ema": "optim.ema",
    "mixup": "augment.mixup",
    "cutmix": "augment.cutmix",
    "auto_augment": "augment.auto_augment",
    "seed": "seed",
    "device": "runtime.device",
    "amp": "runtime.amp",
    "channels_last": "runtime.channels_last",
    "compile_": "runtime.compile",
    "sync_bn": "runtime.sync_bn",
    "graph_scope": "runtime.graph_scope",
    "log": "runtime.loggers",
    "save_every_steps": "runtime.save_every_steps",
    "save_every_minutes": "runtime.save_every_minutes",
}
"""Parameter of `distill` -> configuration key. Everything else is set with --set."""

NETWORKS, DATA, MATCHING, METHOD, TRAINING, RUNTIME = "Networks", "Data", "Matching", "Method", "Training", "Run"
RESULT = "Result"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"irgdistill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _option(group: str, *names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=group, show_default=False)


@app.command()
def distill(
    teacher: Annotated[str | None, _option(NETWORKS, help="timm name, hf-hub:… or local-dir:…")] = None,
    teacher_checkpoint: Annotated[
        Path | None, _option(NETWORKS, help="Weights (.safetensors, .pth); one of ours names its network.")
    ] = None,
    teacher_input_size: Annotated[
        str | None, _option(NETWORKS, help="224 or 256x192; default: the teacher's own.")
    ] = None,
    teacher_cache: Annotated[Path | None, _option(NETWORKS, help="What `cache-teacher` wrote, in its place.")] = None,
    student: Annotated[str | None, _option(NETWORKS, help="timm name of the network to train.")] = None,
    input_size: Annotated[str | None, _option(NETWORKS, help="Student's; default: its own.")] = None,
    skip_teacher_check: Annotated[
        bool, _option(NETWORKS, "--skip-teacher-check", help="Train even if the teacher is near chance.")
    ] = False,
    data: Annotated[str | None, _option(DATA, help="Image folder, .tar, digits, or torch/…, hfds/…, wds/….")] = None,
    data_root: Annotated[Path | None, _option(DATA, help="Where a named data set keeps its files.")] = None,
    download: Annotated[bool | None, _option(DATA, "--download", help="Fetch a named data set.")] = None,
    val_fraction: Annotated[float | None, _option(DATA, help="Hold out this share for validation.")] = None,
    balanced: Annotated[bool | None, _option(DATA, "--balanced", help="Draw every class equally often.")] = None,
    no_labels: Annotated[
        bool, _option(DATA, "--no-labels", help="Any images; all is learnt from the teacher.")
    ] = False,
    max_bad_images: Annotated[int | None, _option(DATA, help="Unreadable images to skip (10).")] = None,
    batch_size: Annotated[int | None, _option(DATA, help="Images per step, the graph's size (128).")] = None,
    workers: Annotated[int | None, _option(DATA, help="Loader processes (1); the result is the same.")] = None,
    levels: Annotated[int | None, _option(MATCHING, help="Match by depth, in at most so many stages.")] = None,
    skip_level: Annotated[list[int] | None, _option(MATCHING, help="Leave out /N; may be repeated.")] = None,
    taps_teacher: Annotated[str | None, _option(MATCHING, help="Blocks that end the stages: NAME,NAME.")] = None,
    taps_student: Annotated[str | None, _option(MATCHING, help="Blocks that end the stages: NAME,NAME.")] = None,
    method: Annotated[
        str | None, _option(METHOD, help="irg+kd (default), mtk, irg, none, or a rival: kd, at, …")
    ] = None,
    kd_weight: Annotated[float | None, _option(METHOD, help="Soft targets.")] = None,
    logits_weight: Annotated[float | None, _option(METHOD, help="Logit regression.")] = None,
    edges_weight: Annotated[float | None, _option(METHOD, help="Edge matrices of the last stage.")] = None,
    transform_weight: Annotated[float | None, _option(METHOD, help="Transformations of all stages.")] = None,
    temperature: Annotated[float | None, _option(METHOD, help="Of the soft targets (4).")] = None,
    edge_blocks: Annotated[int | None, _option(METHOD, help="1: one-to-one; K: one-to-many.")] = None,
    label_smoothing: Annotated[float | None, _option(METHOD, help="Of the labels (0).")] = None,
    epochs: Annotated[int | None, _option(TRAINING, help="Passes over the training images (100).")] = None,
    warmup_epochs: Annotated[float | None, _option(TRAINING, help="Linear warm-up (0).")] = None,
    opt: Annotated[str | None, _option(TRAINING, help="timm optimizer (sgd).")] = None,
    lr: Annotated[float | None, _option(TRAINING, help="Peak learning rate (0.1).")] = None,
    weight_decay: Annotated[float | None, _option(TRAINING, help="(5e-4)")] = None,
    clip_grad: Annotated[float | None, _option(TRAINING, help="Maximum gradient norm.")] = None,
    accumulate: Annotated[int | None, _option(TRAINING, help="Batches per update (1).")] = None,
    ema: Annotated[float | None, _option(TRAINING, help="Decay of averaged weights, such as 0.999.")] = None,
    mixup: Annotated[float | None, _option(TRAINING, help="Alpha.")] = None,
    cutmix: Annotated[float | None, _option(TRAINING, help="Alpha.")] = None,
    auto_augment: Annotated[str | None, _option(TRAINING, help="timm policy, such as rand-m9-mstd0.5.")] = None,
    seed: Annotated[int | None, _option(TRAINING, help="Weights, order and augmentation (0).")] = None,
    device: Annotated[str | None, _option(RUNTIME, help="auto, cpu, cuda, cuda:1, ….")] = None,
    amp: Annotated[str | None, _option(RUNTIME, help="auto, none, bf16 or fp16.")] = None,
    channels_last: Annotated[bool | None, _option(RUNTIME, "--channels-last", help="Memory layout.")] = None,
    compile_: Annotated[bool | None, _option(RUNTIME, "--compile", help="Use torch.compile.")] = None,
    gpus: Annotated[str | None, _option(RUNTIME, help="Processes on this machine: a number, or all.")] = None,
    backend: Annotated[str | None, _option(RUNTIME, help="nccl, or gloo to run them on the CPU.")] = None,
    sync_bn: Annotated[bool | None, _option(RUNTIME, "--sync-bn", help="Batch-norm over all processes.")] = None,
    graph_scope: Annotated[str | None, _option(RUNTIME, help="global (default), or local to a process.")] = None,
    log: Annotated[list[str] | None, _option(RUNTIME, help="tensorboard or wandb; may be repeated.")] = None,
    save_every_steps: Annotated[int | None, _option(RUNTIME, help="Save after so many updates too.")] = None,
    save_every_minutes: Annotated[float | None, _option(RUNTIME, help="Save after so many minutes too.")] = None,
    preset: Annotated[str | None, _option(RUNTIME, help="Name of a preset, or a YAML file.")] = None,
    settings: Annotated[list[str] | None, _option(RUNTIME, "--set", help="Any key.path=value.")] = None,
    output: Annotated[Path | None, _option(RUNTIME, help="Run folder (runs/STUDENT-METHOD-N).")] = None,
    overwrite: Annotated[bool, _option(RUNTIME, "--overwrite", help="Replace the run that is there.")] = False,
    resume: Annotated[Path | None, _option(RUNTIME, help="Go on with this run folder.")] = None,
    previous_state: Annotated[
        bool, _option(RUNTIME, "--previous-state", help="Resume from the state before the last one.")
    ] = False,
    dry_run: Annotated[bool, _option(RUNTIME, "--dry-run", help="Show configuration and plan; stop.")] = False,
) -> None:
    """Train a student under a teacher (or alone: --method none).

    Stages are matched by spatial resolution; no layer names are needed.

    Example: irgdistill distill --teacher resnet50 --student mobilenetv2_100 --data ./imagenet
    """
    from irgdistill.config import load_config

    given = {FLAGS[name]: value for name, value in locals().items() if name in FLAGS and value is not None}
    if skip_teacher_check:
        given["teacher.check"] = False
    if no_labels:
        given["data.labels"] = False
    if resume is not None:
        if preset or settings or output or overwrite or dry_run:
            raise UserError(
                "--resume goes on with the run's own configuration; "
                "leave out --preset, --set, --output, --overwrite and --dry-run"
            )
        _resume(resume, given, previous_state, gpus, backend)
        return
    if previous_state:
        raise UserError("--previous-state says where --resume RUN goes on from; there is no --resume")
    config = load_config(preset, settings, given)

    from irgdistill.run import dry_run as show
    from irgdistill.run import start

    if dry_run:
        show(config)
    else:
        start(config, output, overwrite, gpus, backend)


def _resume(folder: Path, given: dict[str, Any], previous_state: bool, gpus: str | None, backend: str | None) -> None:
    from irgdistill.config import MOVABLE

    fixed = sorted(set(given) - MOVABLE)
    if fixed:
        raise UserError(f"--resume cannot change {', '.join(fixed)}; it may change {', '.join(sorted(MOVABLE))}")
    from irgdistill.run import resume

    resume(folder, given, previous_state, gpus, backend)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare(
    context: typer.Context,
    methods: Annotated[str, _option(METHOD, help="Of `distill`, with commas (none,kd,irg+kd).")] = "none,kd,irg+kd",
    seeds: Annotated[int, _option(TRAINING, help="Runs of each method, from --seed on (3).")] = 3,
    jobs: Annotated[int, _option(RUNTIME, help="Runs at once on one device (1).")] = 1,
    output: Annotated[Path, _option(RUNTIME, help="Its run folders and tables (runs/compare).")] = Path("runs/compare"),
) -> None:
    """Train one student by several methods and seeds, and make one table. Takes the options of `distill` too.

    What is finished is skipped, what is not goes on.

    Example: irgdistill compare --methods none,kd,irg+kd --teacher resnet50 --student resnet18 --data ./imagenet
    """
    from irgdistill.compare import Request
    from irgdistill.compare import compare as run
    from irgdistill.config import MOVABLE

    refused = ("method", "no_labels", "resume", "previous_state", "overwrite", "dry_run", "gpus", "backend")
    options, flags = _as_distill(context, refused)
    options_of = {key: f"--{name.replace('_', '-')}" for name, key in FLAGS.items()}
    movable = {
        options_of[key]: str(value) for key, value in flags.items() if key in MOVABLE and key != "runtime.loggers"
    }
    run(
        Request(
            methods=[name for name in methods.replace(" ", "").split(",") if name],
            seeds=seeds,
            output=output,
            jobs=jobs,
            preset=options["preset"],
            settings=list(options["settings"] or ()),
            flags=flags,
            moved=[word for option in movable.items() for word in option],
        )
    )


def _as_distill(context: typer.Context, refused: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that a command takes as `distill` does -> all of them, and configuration keys with their values."""
    assert context.parent is not None
    parser = typer.main.get_command(app).commands["distill"]  # type: ignore[attr-defined]
    options = parser.make_context(context.info_name, list(context.args), parent=context.parent).params
    for name in refused:
        if options[name]:
            raise UserError(f"{context.info_name} does not take --{name.replace('_', '-')}")
    given = {name: value for name, value in options.items() if name in FLAGS and value not in (None, (), [])}
    flags = {FLAGS[name]: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    if options["skip_teacher_check"]:
        flags["teacher.check"] = False
    return options, flags


@app.command(name="cache-teacher", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def cache_teacher(
    context: typer.Context,
    views: Annotated[int, _option(DATA, help="Augmented views of each image (1).")] = 1,
    store: Annotated[str, _option(RESULT, help="Numbers as fp16 (default) or fp32.")] = "fp16",
    logits: Annotated[str, _option(RESULT, help="all (default), or how many of the largest.")] = "all",
    output: Annotated[Path, _option(RESULT, help="Its folder (runs/teacher-cache).")] = Path("runs/teacher-cache"),
) -> None:
    """Run the teacher once over every view of every training image. Takes the options of `distill` too.

    Students then train with `distill --teacher-cache FOLDER`, with no teacher in memory.

    Example: irgdistill cache-teacher --teacher resnet50 --data ./imagenet --views 20
    """
    from irgdistill.config import load_config

    refused = ("resume", "previous_state", "overwrite", "dry_run", "gpus", "backend", "teacher_cache")
    options, flags = _as_distill(context, refused)
    config = load_config(options["preset"], list(options["settings"] or ()), flags)

    from irgdistill.caching import Request
    from irgdistill.caching import cache_teacher as run

    run(Request(output, views, store, logits), config)


@app.command(name="inspect-graph")
def inspect_graph(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|CKPT]", help="A student's run or checkpoint.", show_default=False),
    ] = None,
    teacher: Annotated[str | None, _option(NETWORKS, help="timm name.")] = None,
    teacher_checkpoint: Annotated[Path | None, _option(NETWORKS, help="Its weights; default: pretrained.")] = None,
    teacher_input_size: Annotated[str | None, _option(NETWORKS, help="224 or 256x192.")] = None,
    student: Annotated[str | None, _option(NETWORKS, help="timm name; untrained without weights.")] = None,
    student_checkpoint: Annotated[Path | None, _option(NETWORKS, help="Its weights.")] = None,
    student_pretrained: Annotated[
        bool, _option(NETWORKS, "--student-pretrained", help="Take its pretrained weights.")
    ] = False,
    input_size: Annotated[str | None, _option(NETWORKS, help="The student's.")] = None,
    compare: Annotated[str | None, _option(NETWORKS, help="Another run or checkpoint of the same student.")] = None,
    data: Annotated[str | None, _option(DATA, help="Default: what the checkpoint remembers.")] = None,
    data_root: Annotated[Path | None, _option(DATA, help="Where a named data set keeps its files.")] = None,
    val_fraction: Annotated[float | None, _option(DATA, help="Hold out this share.")] = None,
    max_bad_images: Annotated[int | None, _option(DATA, help="Unreadable images to skip (10).")] = None,
    split: Annotated[str, _option(DATA, help="val (default) or train.")] = "val",
    images: Annotated[int, _option(DATA, help="Drawn evenly over the classes (64).")] = 64,
    seed: Annotated[int | None, _option(DATA, help="Of the draw and of untrained weights (0).")] = None,
    levels: Annotated[int | None, _option(MATCHING, help="Match by depth, in at most so many stages.")] = None,
    skip_level: Annotated[list[int] | None, _option(MATCHING, help="Leave out /N; may be repeated.")] = None,
    taps_teacher: Annotated[str | None, _option(MATCHING, help="Blocks that end the stages: NAME,NAME.")] = None,
    taps_student: Annotated[str | None, _option(MATCHING, help="Blocks that end the stages: NAME,NAME.")] = None,
    neighbours: Annotated[int, _option(RESULT, help="Of each image that are compared (5).")] = 5,
    form: Annotated[str, _option(RESULT, "--format", help="Of the figures: png (default), svg or pdf.")] = "png",
    terminal: Annotated[bool, _option(RESULT, "--terminal", help="Draw the heatmaps here, too.")] = False,
    output: Annotated[Path | None, _option(RESULT, help="Default: RUN/graphs or graphs/TEACHER-STUDENT.")] = None,
    plan_only: Annotated[
        bool, _option(RESULT, "--plan-only", help="Show which stages meet; no data, no weights.")
    ] = False,
    as_json: Annotated[bool, _option(RESULT, "--json", help="Print one JSON object.")] = False,
    step: Annotated[int | None, _option(RUNTIME, "--batch-size", help="Images per step (64).")] = None,
    workers: Annotated[int | None, _option(RUNTIME, help="Loader processes (1).")] = None,
    device: Annotated[str | None, _option(RUNTIME, help="auto, cpu, cuda, cuda:1, ….")] = None,
) -> None:
    """Show which stages of two networks meet, and how each relates the same images to one another.

    Example: irgdistill inspect-graph runs/mobilenetv2_100-irg-kd-1 --images 256
    """
    from irgdistill.config import load_config

    given = {FLAGS[name]: value for name, value in locals().items() if name in FLAGS and value is not None}
    config = load_config(flags={**given, "data.eval_batch_size": 64 if step is None else step})

    from irgdistill.inspect_setup import Request, show_plan

    request = Request(
        target=target,
        student_checkpoint=student_checkpoint,
        student_pretrained=student_pretrained,
        compare=compare,
        images=images,
        split=split,
        neighbours=neighbours,
        format=form,
        terminal=terminal,
        output=output,
        as_json=as_json,
    )
    if plan_only:
        show_plan(request, config)
        return
    from irgdistill.inspect_run import inspect

    inspect(request, config, set(given))


@app.command()
def export(
    target: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="A student's run or checkpoint.")],
    form: Annotated[
        str,
        _option(
            RESULT, "--format", help="hub (default): folder for timm and the Hub; onnx; program: torch.export; timm."
        ),
    ] = "hub",
    output: Annotated[
        Path | None, _option(RESULT, help="Default, beside the checkpoint: hub, timm, NAME.onnx or NAME.pt2.")
    ] = None,
    overwrite: Annotated[bool, _option(RESULT, "--overwrite", help="Replace what is there.")] = False,
    raw_input: Annotated[
        bool,
        _option(
            RESULT, "--raw-input", help="onnx, program: take RGB in [0, 1]; default: images normalised as by timm."
        ),
    ] = False,
    opset: Annotated[int | None, _option(RESULT, help="Of the ONNX file, 18 or higher (torch's choice).")] = None,
    push: Annotated[str | None, _option(RESULT, help="Upload the folder to this repository on the Hub.")] = None,
    license_: Annotated[str | None, _option(RESULT, "--license", help="In the model card (apache-2.0).")] = None,
    check_images: Annotated[
        int,
        typer.Option(min=1, help="Validation images on which it must agree with the student.", rich_help_panel=DATA),
    ] = 64,
    data: Annotated[str | None, _option(DATA, help="Default: what the checkpoint remembers.")] = None,
    data_root: Annotated[Path | None, _option(DATA, help="Where a named data set keeps its files.")] = None,
) -> None:
    """Hand the student on: a folder for timm and the Hub, ONNX, torch.export, or plain timm weights.

    Example: irgdistill export runs/mobilenetv2_100-irg-kd-1 --format onnx
    """
    from irgdistill.config import load_config

    given = {key: value for key, value in {"data.source": data, "data.root": data_root}.items() if value is not None}
    config = load_config(flags={**given, "data.workers": 0, "data.eval_batch_size": 64})

    from irgdistill.export import Request
    from irgdistill.export import export as run

    run(
        Request(
            target=target,
            format=form,
            output=output,
            overwrite=overwrite,
            push=push,
            license=license_,
            opset=opset,
            raw_input=raw_input,
            check_images=check_images,
            data=config.data,
            given=frozenset(given),
        )
    )


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(metavar="[FILTER]", help="Such as resnet or mobilenet*_100.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List networks with parameters, multiply-adds, input size and the resolutions of their stages.

    Example: irgdistill models 'mobilenet*'
    """
    from irgdistill.run import list_models

    list_models(pattern, as_json)


@app.command(name="eval")
def evaluate(
    targets: Annotated[list[str], typer.Argument(help="Checkpoint, run folder or timm name; several make a table.")],
    data: Annotated[str | None, typer.Option(help="Default: what the checkpoint remembers.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Where a named data set keeps its files.")] = None,
    against: Annotated[str | None, typer.Option(help="Teacher: checkpoint, run folder or timm name.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for a timm name.")] = None,
    against_checkpoint: Annotated[Path | None, typer.Option(help="Weights for the teacher's timm name.")] = None,
    input_size: Annotated[str | None, typer.Option(help="224 or 256x192.")] = None,
    val_fraction: Annotated[float | None, typer.Option(help="Hold out this share.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ….")] = "auto",
    amp: Annotated[str, typer.Option(help="auto, none, bf16 or fp16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Accuracy, calibration, size and speed of a network.

    Example: irgdistill eval runs/mobilenetv2_100-irg-kd-1
    """
    from irgdistill.config import load_config

    flags = {
        "data.source": data,
        "data.root": data_root,
        "data.val_fraction": val_fraction,
        "data.eval_batch_size": batch_size,
        "data.workers": workers,
        "student.input_size": input_size,
        "runtime.device": device,
        "runtime.amp": amp,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    config = load_config(flags=given)

    from irgdistill.run import evaluate_targets

    evaluate_targets(targets, checkpoint, against, against_checkpoint, config, set(given), as_json)


def main() -> None:
    """Entry point: runs the app, turns our errors into one line and an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with Signals():
            app()
    except UserError as error:
        _die(str(error), 2)
    except OSError as error:
        _die(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 2)
    except Stopped as stop:
        _die(str(stop), 128 + stop.number)
    except Interrupted as error:
        _die(str(error), error.code)
    except Exception as error:
        if not leave_word(f"{type(error).__name__}: {error}\n{traceback.format_exc()}", 1):
            raise
        sys.exit(1)


def _die(message: str, code: int) -> None:
    """Say why and leave; of the processes of a run only one speaks."""
    if not leave_word(message, code) and os.environ.get("RANK", "0") == "0":
        typer.echo(f"irgdistill: {message}", err=True)
    sys.exit(code)
