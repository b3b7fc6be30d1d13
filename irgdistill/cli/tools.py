"""Commands that train nothing: networks and their graphs, students handed on or measured, the machine, presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from irgdistill.cli.completion import complete_network, complete_preset, remember_names
from irgdistill.cli.options import DATA, MATCHING, NETWORKS, RESULT, RUNTIME, option, options_of_distill, settings_of
from irgdistill.config import FLAGS


def export(
    target: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="A student's run or checkpoint.")],
    form: Annotated[
        str,
        option(
            RESULT, "--format", help="hub (default): folder for timm and the Hub; onnx; program: torch.export; timm."
        ),
    ] = "hub",
    output: Annotated[
        Path | None, option(RESULT, help="Default, beside the checkpoint: hub, timm, NAME.onnx or NAME.pt2.")
    ] = None,
    overwrite: Annotated[bool, option(RESULT, "--overwrite", help="Replace what is there.")] = False,
    raw_input: Annotated[
        bool,
        option(RESULT, "--raw-input", help="onnx, program: take RGB in [0, 1]; default: images normalised as by timm."),
    ] = False,
    opset: Annotated[int | None, option(RESULT, help="Of the ONNX file, 18 or higher (torch's choice).")] = None,
    push: Annotated[str | None, option(RESULT, help="Upload the folder to this repository on the Hub.")] = None,
    license_: Annotated[str | None, option(RESULT, "--license", help="In the model card (apache-2.0).")] = None,
    check_images: Annotated[
        int,
        typer.Option(min=1, help="Validation images on which it must agree with the student.", rich_help_panel=DATA),
    ] = 64,
    data: Annotated[str | None, option(DATA, help="Default: what the checkpoint remembers.")] = None,
    data_root: Annotated[Path | None, option(DATA, help="Where a named data set keeps its files.")] = None,
) -> None:
    """Hand the student on: a folder for timm and the Hub, ONNX, torch.export, or plain timm weights."""
    from irgdistill.commands.requests import ExportRequest
    from irgdistill.config import load_config

    given = {key: value for key, value in {"data.source": data, "data.root": data_root}.items() if value is not None}
    config = load_config(flags={**given, "data.workers": 0, "data.eval_batch_size": 64})

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
        data=config.data,
        given=frozenset(given),
    )
    from irgdistill.commands.export.run import export as run

    run(request)


def models(
    pattern: Annotated[str, typer.Argument(metavar="[FILTER]", help="Such as resnet or mobilenet*_100.")] = "*",
    as_json: Annotated[bool, option(RESULT, "--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List networks with parameters, multiply-adds, input size and the resolutions of their stages."""
    from irgdistill.commands.models import list_models

    remember_names()
    list_models(pattern, as_json)


def evaluate(
    targets: Annotated[list[str], typer.Argument(help="Checkpoint, run folder or timm name; several make a table.")],
    checkpoint: Annotated[Path | None, option(NETWORKS, help="Weights for a timm name.")] = None,
    against: Annotated[str | None, option(NETWORKS, help="Teacher: checkpoint, run folder or timm name.")] = None,
    against_checkpoint: Annotated[Path | None, option(NETWORKS, help="Weights for the teacher's timm name.")] = None,
    input_size: Annotated[str | None, option(NETWORKS, help="224 or 256x192.")] = None,
    data: Annotated[str | None, option(DATA, help="Default: what the checkpoint remembers.")] = None,
    data_root: Annotated[Path | None, option(DATA, help="Where a named data set keeps its files.")] = None,
    val_fraction: Annotated[float | None, option(DATA, help="Hold out this share.")] = None,
    max_bad_images: Annotated[int | None, option(DATA, help="Unreadable images to skip (10).")] = None,
    batch_size: Annotated[int, option(RUNTIME, help="Images per step (256).")] = 256,
    workers: Annotated[int, option(RUNTIME, help="Loader processes (1).")] = 1,
    device: Annotated[str, option(RUNTIME, help="auto, cpu, cuda, cuda:1, ….")] = "auto",
    amp: Annotated[str, option(RUNTIME, help="auto, none, bf16 or fp16.")] = "auto",
    as_json: Annotated[bool, option(RESULT, "--json", help="Print one JSON object.")] = False,
) -> None:
    """Accuracy, calibration, size and speed of a network."""
    from irgdistill.commands.requests import EvalRequest
    from irgdistill.config import load_config

    flags = {
        "data.source": data,
        "data.root": data_root,
        "data.val_fraction": val_fraction,
        "data.max_bad_images": max_bad_images,
        "data.eval_batch_size": batch_size,
        "data.workers": workers,
        "student.input_size": input_size,
        "runtime.device": device,
        "runtime.amp": amp,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    config = load_config(flags=given)
    request = EvalRequest(targets, config, frozenset(given), checkpoint, against, against_checkpoint, as_json)
    from irgdistill.commands.evaluate import evaluate_targets

    evaluate_targets(request)


def inspect_graph(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|CKPT]", help="A student's run or checkpoint.", show_default=False),
    ] = None,
    teacher: Annotated[str | None, option(NETWORKS, help="timm name.", complete=complete_network)] = None,
    teacher_checkpoint: Annotated[Path | None, option(NETWORKS, help="Its weights; default: pretrained.")] = None,
    teacher_input_size: Annotated[str | None, option(NETWORKS, help="224 or 256x192.")] = None,
    student: Annotated[
        str | None, option(NETWORKS, help="timm name; untrained without weights.", complete=complete_network)
    ] = None,
    student_checkpoint: Annotated[Path | None, option(NETWORKS, help="Its weights.")] = None,
    student_pretrained: Annotated[
        bool, option(NETWORKS, "--student-pretrained", help="Take its pretrained weights.")
    ] = False,
    input_size: Annotated[str | None, option(NETWORKS, help="The student's.")] = None,
    compare: Annotated[str | None, option(NETWORKS, help="Another run or checkpoint of the same student.")] = None,
    data: Annotated[str | None, option(DATA, help="Default: what the checkpoint remembers.")] = None,
    data_root: Annotated[Path | None, option(DATA, help="Where a named data set keeps its files.")] = None,
    val_fraction: Annotated[float | None, option(DATA, help="Hold out this share.")] = None,
    max_bad_images: Annotated[int | None, option(DATA, help="Unreadable images to skip (10).")] = None,
    split: Annotated[str, option(DATA, help="val (default) or train.")] = "val",
    images: Annotated[int, option(DATA, help="Drawn evenly over the classes (64).")] = 64,
    seed: Annotated[int | None, option(DATA, help="Of the draw and of untrained weights (0).")] = None,
    levels: Annotated[int | None, option(MATCHING, help="Match by depth, in at most so many stages.")] = None,
    skip_level: Annotated[list[int] | None, option(MATCHING, help="Leave out /N; may be repeated.")] = None,
    taps_teacher: Annotated[str | None, option(MATCHING, help="Blocks that end the stages: NAME,NAME.")] = None,
    taps_student: Annotated[str | None, option(MATCHING, help="Blocks that end the stages: NAME,NAME.")] = None,
    neighbours: Annotated[int, option(RESULT, help="Of each image that are compared (5).")] = 5,
    form: Annotated[str, option(RESULT, "--format", help="Of the figures: png (default), svg or pdf.")] = "png",
    terminal: Annotated[bool, option(RESULT, "--terminal", help="Draw the heatmaps here, too.")] = False,
    output: Annotated[Path | None, option(RESULT, help="Default: RUN/graphs or graphs/TEACHER-STUDENT.")] = None,
    plan_only: Annotated[
        bool, option(RESULT, "--plan-only", help="Show which stages meet; no data, no weights.")
    ] = False,
    as_json: Annotated[bool, option(RESULT, "--json", help="Print one JSON object.")] = False,
    step: Annotated[int | None, option(RUNTIME, "--batch-size", help="Images per step (64).")] = None,
    workers: Annotated[int | None, option(RUNTIME, help="Loader processes (1).")] = None,
    device: Annotated[str | None, option(RUNTIME, help="auto, cpu, cuda, cuda:1, ….")] = None,
) -> None:
    """Show which stages of two networks meet, and how each relates the same images to one another."""
    from irgdistill.commands.requests import InspectRequest
    from irgdistill.config import load_config

    given = {FLAGS[name]: value for name, value in locals().items() if name in FLAGS and value is not None}
    request = InspectRequest(
        load_config(flags={**given, "data.eval_batch_size": 64 if step is None else step}),
        frozenset(given),
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
        plan_only=plan_only,
        as_json=as_json,
    )
    from irgdistill.commands.inspect.run import inspect

    inspect(request)


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, option(RESULT, "--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what this machine has; with the options of `distill`, whether that run fits and what slows it down.

    Exit code 1: it does not fit.
    """
    from irgdistill.commands.requests import DoctorRequest
    from irgdistill.config import load_config

    refused = ("resume", "previous_state", "overwrite", "dry_run", "quiet")
    options = options_of_distill(context, "doctor", refused)
    config = load_config(options["preset"], list(options["settings"] or ()), settings_of(options))
    request = DoctorRequest(
        config, bool(context.args), options["output"] or Path("runs"), options["gpus"], options["backend"], as_json
    )
    from irgdistill.commands.doctor.report import diagnose

    if not diagnose(request):
        raise typer.Exit(1)


def presets(
    name: Annotated[
        str | None,
        typer.Argument(help="Print this one.", show_default=False, autocompletion=complete_preset),
    ] = None,
    as_json: Annotated[bool, option(RESULT, "--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List the presets that come with irgdistill, or print one to copy and change."""
    from irgdistill.config import preset_files

    files = preset_files(name)
    texts = {path: path.read_text(encoding="utf-8") for path in files.values()}
    summaries = {path: text.partition("\n")[0].lstrip("# ") for path, text in texts.items()}
    if as_json:
        for known, path in files.items():
            values = {"name": known, "summary": summaries[path], "path": str(path), "text": texts[path]}
            typer.echo(json.dumps(values))
    elif name is not None:
        typer.echo("".join(texts.values()), nl=False)
        typer.echo(f"from {', '.join(map(str, texts))}", err=True)
    else:
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text

        console = Console(highlight=False)
        for known, path in files.items():
            console.print(Text(known, style="bold"))
            console.print(Padding(Text(summaries[path]), (0, 0, 0, 2)))
