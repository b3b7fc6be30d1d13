"""What the commands do, between the command line and the rooms below."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from irgdistill.checkpoint import RunFolder, find_checkpoint, restore
from irgdistill.config import dump, validate
from irgdistill.data import eval_loader
from irgdistill.distributed import World, joined, ranks, restarts, run_workers
from irgdistill.errors import Interrupted, UserError, nearest
from irgdistill.evaluate import Metrics, evaluate
from irgdistill.images import BadImages
from irgdistill.matching import Plan, ends
from irgdistill.models import Network, build_network, known_models, multiply_adds, parameters
from irgdistill.report import Report, table
from irgdistill.settings import Config, DataConfig
from irgdistill.setup import Setup, autocast, check_processes, choose_device, prepare, resolved
from irgdistill.signals import Stopped
from irgdistill.sources import open_splits
from irgdistill.state import open_state, position, score
from irgdistill.taps import Tapped, tap_name
from irgdistill.trainer import Trainer


def dry_run(config: Config, as_json: bool = False) -> None:
    """Print the resolved configuration and the matching; check everything that can be checked without training."""
    setup = prepare(config)
    if as_json:
        plan = None if setup.plan is None else setup.plan.to_dict()
        values = {"config": setup.config.model_dump(mode="json"), "plan": plan, "start": setup.start}
        print(json.dumps(values))  # noqa: T201  the command's result
        return
    print_plan(setup.plan)
    if setup.start:
        Report().line(setup.start)
    print(dump(setup.config), end="")  # noqa: T201  the command's result


def list_models(pattern: str, as_json: bool) -> None:
    """Print a line for every network whose name matches, as it is measured on the meta device."""
    names = [name for name in known_models() if fnmatch(name, pattern) or pattern in name]
    if not names:
        raise UserError(f"no model matches {pattern!r}{nearest(pattern, known_models())}")
    if not as_json:
        print(f"{'name':44} {'parameters':>14} {'multiply-adds':>16} {'input':>9}  levels")  # noqa: T201
    for name in names:
        network = build_network(name, meta=True)
        try:
            reductions = [2**level.level for level in network.levels()]
        except UserError:
            reductions = []
        size = f"{network.size[0]}×{network.size[1]}"
        count, macs = parameters(network.model), multiply_adds(network)
        if as_json:
            values = {"name": name, "params": count, "macs": macs, "input_size": network.size, "levels": reductions}
            print(json.dumps(values), flush=True)  # noqa: T201
        else:
            text = " ".join(f"/{reduction}" for reduction in reductions)
            print(f"{name:44} {count:14,} {macs:16,} {size:>9}  {text}", flush=True)  # noqa: T201


def start(
    config: Config, output: Path | None, overwrite: bool, gpus: str | None = None, backend: str | None = None
) -> dict[str, Any] | None:
    """Train from the beginning, in a new folder; in `gpus` processes of this machine, or among those of torchrun.

    The summary and the `folder` in the process that leads the run; None in others.
    """
    restarted = restarts() > 0
    config = resolved(config)
    folder = RunFolder(output or _next_folder(config, last=restarted))
    if not restarted:
        folder.refuse(overwrite)
    with _says_where_it_stands(folder):
        setup = _ready(config, gpus, backend)
        if setup is None:
            return None
        with joined(config.runtime.device, backend) as world:
            folder = RunFolder(world.share(folder.path))
            if world.share(restarted and folder.state.exists()):
                return _go_on(folder, setup, world, open_state(folder)[0])
            trainer = Trainer(setup, folder, Report(folder.metrics, quiet=not world.main), world)
            if world.main:
                print_plan(setup.plan)
            if setup.start:
                trainer.report.line(setup.start)
            trainer.report.line(f"run folder {folder.path}")
            _tell(trainer)
            trainer.start(overwrite or restarted)
            return _finish(trainer)


def _ready(config: Config, gpus: str | None, backend: str | None, begun: bool = False) -> Setup | None:
    """What this process trains with; None: workers were started, and have done it. Raises UserError before that."""
    if backend == "gloo":
        config.runtime.device = "cpu"
    setup, workers = prepare(config, begun), _workers(config, gpus, backend)
    check_processes(config, setup.splits, workers or ranks())
    if not workers:
        return setup
    del setup
    run_workers(workers, sys.argv[1:])
    return None


def _workers(config: Config, gpus: str | None, backend: str | None) -> int:
    """How many processes to start here; 0: none, this is one of them. Raises UserError."""
    if backend not in (None, "nccl", "gloo"):
        raise UserError(f"--backend {backend}: nccl, or gloo to run on the CPU{nearest(backend, ['nccl', 'gloo'])}")
    there = torch.cuda.device_count()
    if backend == "nccl" and not there:
        raise UserError("--backend nccl: there is no GPU here; --backend gloo runs the processes on the CPU")
    if gpus is None or ranks() > 1:
        return 0
    if gpus != "all" and not (gpus.isdecimal() and int(gpus) > 0):
        raise UserError(f"--gpus {gpus}: expected a number of processes on this machine, or all")
    if config.runtime.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {config.runtime.device} is one device; with --gpus leave it out, or give cpu or cuda"
        )
    on_cpu = backend == "gloo" or config.runtime.device == "cpu"
    count = there if gpus == "all" else int(gpus)
    if count == 0 or (count > there and not on_cpu):
        raise UserError(f"--gpus {gpus}: there are {there} GPUs here; --backend gloo runs the processes on the CPU")
    return count if count > 1 else 0


def _tell(trainer: Trainer) -> None:
    """How many processes train, and what a relation spans."""
    world, runtime, batch = trainer.world, trainer.config.runtime, trainer.config.data.batch_size
    if world.size > 1:
        spans = f"all {batch}" if runtime.graph_scope == "global" else f"the {batch // world.size} of each process"
        statistics = "synchronised" if runtime.sync_bn else "averaged every epoch"
        trainer.report.line(
            f"{world.size} processes share batches of {batch} images; relations span {spans}; "
            f"batch-norm statistics are {statistics}"
        )


def resume(
    path: Path, changes: Mapping[str, Any], previous: bool = False, gpus: str | None = None, backend: str | None = None
) -> dict[str, Any] | None:
    """Go on where the state in a run folder stands; returns what `start` does.

    Raises UserError when there is nothing to go on with.
    """
    folder = RunFolder(path)
    if folder.summary.exists():
        raise UserError(f"{path} holds a finished run; there is nothing to resume")
    if not folder.state.exists() and not folder.previous_state.exists():
        raise UserError(folder.unsaved())
    with _says_where_it_stands(folder):
        state, config = open_state(folder, previous)
        tree = config.model_dump()
        for key, value in changes.items():
            section, name = key.split(".")
            tree[section][name] = value
        setup = _ready(validate(tree), gpus, backend, begun=True)
        if setup is None:
            return None
        with joined(setup.config.runtime.device, backend) as world:
            return _go_on(folder, setup, world, state, previous)


def _go_on(
    folder: RunFolder, setup: Setup, world: World, state: dict[str, Any], previous: bool = False
) -> dict[str, Any] | None:
    if world.main:
        folder.lock()
    trainer = Trainer(setup, folder, Report(folder.metrics, quiet=not world.main), world)
    trainer.resume(state, previous)
    trainer.report.line(f"resuming {folder.path} at {position(state)} of {trainer.batches}")
    _tell(trainer)
    return _finish(trainer)


@contextmanager
def _says_where_it_stands(folder: RunFolder) -> Iterator[None]:
    """A signal that ends everything at once still says what is left."""
    try:
        yield
    except Stopped as stop:
        left = "nothing was trained yet"
        if folder.state.exists():
            left = f"what was saved is safe; go on with: irgdistill distill --resume {folder.path}"
        raise Interrupted(128 + stop.number, f"{stop}; {left}") from None


def _finish(trainer: Trainer) -> dict[str, Any] | None:
    summary = trainer.fit()
    trainer.report.result(
        f"best {score(summary)} at epoch {summary['epoch']} of {summary['epochs']}, "
        f"{summary['seconds']:.0f} s of training, {summary['images_per_second']:,.0f} images/s: {trainer.folder.best}"
    )
    return {**summary, "folder": str(trainer.folder.path)} if trainer.world.main else None


def _next_folder(config: Config, last: bool = False) -> Path:
    """The first free name under runs/; `last`: the one before it."""
    name = f"{config.student.name}-{config.method}".replace("+", "-").replace("/", "-").replace(":", "-")
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path.with_name(f"{name}-{max(number - last, 1)}")


def print_plan(plan: Plan | None, stdout: bool = False) -> None:
    """The matching as a table; what was left out and why below it."""
    if plan is None:
        return
    rows, notes = [], []
    for pair in plan.pairs:
        for role, level in (("teacher", pair.teacher), ("student", pair.student)):
            moved, tap = ends(level), level.exit
            rows.append(
                [
                    pair.name if role == "teacher" else "",
                    role,
                    tap_name(moved[0]) if moved is not None else "–",
                    tap_name(tap),
                    str(len(level.blocks)),
                    str(tap.channels),
                    f"{tap.height}×{tap.width} {tap.layout}" + (f"+{tap.prefix}" if tap.prefix else ""),
                ]
            )
            if moved is not None and (level.kind != "block" or moved[1] != tap):
                notes.append(f"{pair.name} {role}: {level.kind}, {tap_name(moved[0])} → {tap_name(moved[1])}")
    columns = ["stage", "network", "first block", "last block", "blocks", "width", "map"]
    table("matched stages", columns, rows, stdout)
    for note in (*notes, *plan.notes):
        Report(stdout=stdout).line(f"  {note}")


# --- eval -------------------------------------------------------------------------------------------------------------


def evaluate_targets(
    targets: list[str],
    checkpoint: Path | None,
    against: str | None,
    against_checkpoint: Path | None,
    config: Config,
    given: set[str],
    as_json: bool,
) -> None:
    """Evaluate each target and print a table, or JSON: one object, or a list of them for several targets."""
    if checkpoint is not None and len(targets) > 1:
        raise UserError("--checkpoint holds the weights of one network; give one target with it")
    size = config.student.input_size
    results = []
    for target in targets:
        network, metadata = open_network(target, checkpoint, size)
        teacher = open_network(against, against_checkpoint, None)[0] if against else None
        data = data_of(target, metadata, config.data, given)
        metrics = _evaluate(network, teacher, data, config)
        values = {"name": target, "architecture": network.architecture, **asdict(metrics)}
        values |= {"params": parameters(network.model), "macs": multiply_adds(network), "data": data.source}
        results.append({key: value for key, value in values.items() if value is not None})
    if as_json:
        print(json.dumps(results[0] if len(results) == 1 else results, indent=2))  # noqa: T201  the command's result
    else:
        _print_results(results)


def open_network(target: str, checkpoint: Path | None, size: tuple[int, int] | None) -> tuple[Network, dict[str, Any]]:
    """Checkpoint, run folder or timm name (pretrained, or with `checkpoint`) -> network and metadata ({} if none)."""
    path = find_checkpoint(target)
    if path is not None:
        if checkpoint is not None:
            raise UserError(f"{target} is a checkpoint itself; leave out the second one, {checkpoint}")
        if Path(target).is_dir() and path == RunFolder(Path(target)).last:
            Report().warn(f"{target} holds no best.safetensors; taking last.safetensors")
        return restore(path, None, size)
    if checkpoint is not None:
        return restore(checkpoint, target, size)
    return build_network(target, pretrained=True, input_size=size), {}


def data_of(target: str, metadata: Mapping[str, Any], asked: DataConfig, given: set[str]) -> DataConfig:
    """The remembered data set, with what was asked for now on top."""
    if "data" not in metadata:
        if asked.source is None:
            raise UserError(f"{target} does not remember a data set; give --data")
        return asked
    remembered = DataConfig.model_validate(metadata["data"])
    names = {key.removeprefix("data.") for key in given if key.startswith("data.")}
    names |= {"eval_batch_size", "workers"}
    data = remembered.model_copy(update={name: getattr(asked, name) for name in names})
    if data.source and "/" in data.source and Path(data.source).is_absolute() and not Path(data.source).exists():
        raise UserError(f"the data set of {target} is no longer at {data.source}; say where it is with --data")
    return data


def _evaluate(network: Network, teacher: Network | None, data: DataConfig, config: Config) -> Metrics:
    device = choose_device(config.runtime.device)
    splits = open_splits(data, val_only=True, classes=network.classes or network.num_classes)
    if not splits.labelled and teacher is None:
        raise UserError(
            f"the validation images of {data.source} have no labels: give --against TEACHER, or other --data"
        )
    if network.num_classes != len(splits.classes):
        raise UserError(
            f"{network.name} has {network.num_classes} classes, {data.source} has {len(splits.classes)}: not comparable"
        )
    if network.classes is not None and network.classes != splits.classes:
        raise UserError(f"the class names of {data.source} are not those that {network.name} was trained on")
    bad = BadImages(data.max_bad_images, Report().warn)
    size = network.size if teacher is None else max(network.size, teacher.size)
    loader = eval_loader(splits, data, size, network.interpolation, network.crop_pct, device, bad)
    plain = [None if n is None else Tapped(n.model.to(device), n.view().to(device)).eval() for n in (network, teacher)]
    assert plain[0] is not None
    return evaluate(plain[0], loader, autocast(config.runtime.amp, device), plain[1], labelled=splits.labelled)


def _print_results(results: list[dict[str, Any]]) -> None:
    columns = {
        "top-1 %": ("top1", "{:.2f}"),
        "top-5 %": ("top5", "{:.2f}"),
        "loss": ("loss", "{:.4f}"),
        "calibration %": ("calibration_error", "{:.2f}"),
        "agreement %": ("agreement", "{:.2f}"),
        "KL": ("kl", "{:.4f}"),
        "parameters": ("params", "{:,}"),
        "multiply-adds": ("macs", "{:,}"),
        "images/s": ("images_per_second", "{:,.0f}"),
    }
    rows = [
        [title, *(form.format(result[key]) for result in results)]
        for title, (key, form) in columns.items()
        if all(key in result for result in results)
    ]
    names = [result["name"] for result in results]
    table(f"{results[0]['images']:,} images of {results[0]['data']}", ["", *names], rows)
