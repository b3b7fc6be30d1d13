"""Checks that need only the settings and the file system. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from irgdistill.config.methods import DEFAULT_METHOD
from irgdistill.config.schema import Config
from irgdistill.config.sources import check_source
from irgdistill.errors import UserError, nearest


def check_run(config: Config, begun: bool = False) -> None:
    """Raises UserError if a run cannot start, or with `begun` cannot be resumed, which needs fewer files."""
    asked, config = config.method, config.with_method(DEFAULT_METHOD)
    needed = {"--student": config.student.name or config.student.checkpoint, "--data": config.data.source}
    if config.uses_teacher:
        needed = {"--teacher": config.teacher.name or config.teacher.checkpoint or config.teacher.cache, **needed}
    check_missing(needed, "--teacher resnet50 --student mobilenetv2_100 --data ./imagenet")
    if config.student.name is None and config.student.checkpoint is None:
        raise UserError("no student: give --student NAME, any timm name such as mobilenetv2_100")
    if not config.data.labels:
        check_without_labels(config)
    elif not any(weight > 0 for weight in config.losses.weights().values()):
        raise UserError("no loss term has a weight: the student would learn nothing")
    if config.data.labelled_fraction is not None:
        check_partly_labelled(config, f"data.labelled_fraction = {config.data.labelled_fraction:g}")
    check_source(config.data)
    check_views(config)
    if (config.uses_teacher and config.teacher.cache is None) or config.losses.comparing("booster"):
        hints = ", ".join(f"losses.{name}" for name in config.losses.hints())
        check_teacher(config, f"method {asked!r}" if asked != "none" else hints)
    if config.uses_teacher:
        for number, spec in enumerate(config.teachers):
            if spec.name is None and spec.checkpoint is None and spec.cache is None:
                raise UserError(f"teachers.{number} is no network: give its name, checkpoint or cache")
    if not begun:
        files = (path for spec in config.all_teachers for path in (spec.checkpoint, spec.cache))
        check_files(config.student.checkpoint, *files)


def check_missing(options: Mapping[str, object], example: str) -> None:
    """Raises UserError that names all options without a value, if there are several: one has a message of its own."""
    *most, last = [name for name, value in options.items() if value is None] or [""]
    if most:
        raise UserError(f"missing {', '.join(most)} and {last}; for example: {example}")


def check_views(config: Config) -> None:
    """Raises UserError if a term compares two views of each image and there is one, or images are mixed."""
    for name in config.losses.comparing("views"):
        if config.data.second_view is None:
            raise UserError(f"{name} compares two views of each image: --set data.second_view=rand-m3-n1-inc1 adds one")
        if config.augment.mixup or config.augment.cutmix:
            raise UserError(f"{name} compares two views of each image: leave out --mixup and --cutmix")


def check_teacher(config: Config, who: str) -> None:
    """Raises UserError if `who` needs a teacher and neither a name nor a checkpoint is given."""
    if config.teacher.name is None and config.teacher.checkpoint is None:
        alone = " (or --method none to train the student alone)" if who.startswith("method") else ""
        raise UserError(f"{who} needs a teacher: give --teacher NAME or --teacher-checkpoint FILE{alone}")
    check_files(config.teacher.checkpoint)


def check_partly_labelled(config: Config, reason: str) -> None:
    """Raises UserError that names every setting that needs a label for each image; `reason`: why not all have one."""
    used = [f"losses.{name}" for name in config.losses.comparing("labels") if name != "ce"]
    used += ["losses.ce.class_weights"] * (config.losses.ce.class_weights != "none")
    used += ["--balanced"] * config.data.balanced
    used += ["--mixup"] * (config.augment.mixup > 0) + ["--cutmix"] * (config.augment.cutmix > 0)
    if used or not config.data.labels:
        need = f"{', '.join(used)} need{'s' * (len(used) == 1)} every label" if used else "no labels are used"
        raise UserError(f"{reason}: {need}; leave one out")


def check_without_labels(config: Config) -> None:
    """Raises UserError that names every setting that needs labels."""
    config = config.with_method(DEFAULT_METHOD)
    used = [f"losses.{name}" for name in config.losses.comparing("labels")]
    used += ["losses.ce.class_weights"] * (config.losses.ce.class_weights != "none")
    used += ["--label-smoothing"] * (config.losses.ce.label_smoothing > 0)
    used += ["--balanced"] * config.data.balanced
    used += ["data.train_images"] * (config.data.train_images is not None)
    methods = "--method kd, irg, mtk, irg+kd, irg+kd+at or encoder learns from the teacher alone"
    if used:
        raise UserError(f"--no-labels: {', '.join(used)} need labels; leave them out ({methods})")
    if not config.uses_teacher:
        raise UserError(f"--no-labels: method {config.method!r} learns from labels alone; {methods}")
    lasting = config.losses.comparing("logits", "embedding") or config.losses.hints()
    if all(name in config.losses.fades() for name in lasting):
        fades = " and ".join(f"losses.{name}.fade" for name in lasting)
        raise UserError(f"--no-labels: nothing would teach the student to the end; leave out {fades}")


def check_workers(gpus: str | None, backend: str | None) -> None:
    """Raises UserError for values of --gpus and --backend that are not allowed."""
    if backend not in (None, "nccl", "gloo"):
        raise UserError(f"--backend {backend}: nccl, or gloo to run on the CPU{nearest(backend, ['nccl', 'gloo'])}")
    if gpus not in (None, "all") and not (gpus.isdecimal() and int(gpus) > 0):
        raise UserError(f"--gpus {gpus}: expected a number of processes on this machine, or all")


def check_files(*paths: Path | None) -> None:
    """Raises UserError for a path that does not exist."""
    for path in paths:
        if path is not None and not path.exists():
            raise UserError(f"no file {path}")


def check_word(option: str, given: str, allowed: Sequence[str]) -> None:
    """Raises UserError with the nearest allowed word."""
    if given not in allowed:
        words = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise UserError(f"{option} {given}: expected {words}{nearest(given, allowed)}")
