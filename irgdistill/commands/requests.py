"""Validated arguments of each command. Constructing one raises UserError if the options, or their files, cannot work.

Imports no torch, so that a mistake is reported at once. Checks that need the networks or the images come later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from irgdistill.config import (
    METHODS,
    STORES,
    Config,
    DataConfig,
    changeable_on_resume,
    check_files,
    check_missing,
    check_run,
    check_source,
    check_teacher,
    check_without_labels,
    check_word,
    check_workers,
    load_config,
    of_any_teacher,
)
from irgdistill.errors import UserError
from irgdistill.io import WEIGHTS, RunFolder, check_loggers
from irgdistill.runtime import restart_count

EXPORTS = ("hub", "onnx", "program", "timm")


FIGURES = ("png", "svg", "pdf")


MAX_IMAGES = 2048
"""Largest number of images of one inspection, whose report holds every pair of them."""


ADVICE = "give a run folder or checkpoint, or two networks: --teacher T --student S --data D"


@dataclass(frozen=True)
class DistillRequest:
    """A new run."""

    config: Config
    output: Path | None = None
    """Run folder; None: a new one in runs/."""
    overwrite: bool = False
    gpus: str | None = None
    """Processes on this machine."""
    backend: str | None = None

    def __post_init__(self) -> None:
        check_run(self.config)
        check_loggers(self.config.runtime.loggers)
        check_workers(self.gpus, self.backend)
        if self.output is not None and not restart_count():
            RunFolder(self.output).check_overwrite(self.overwrite)

    @property
    def inputs(self) -> list[tuple[str, Path | None]]:
        """Options that name files, and the files."""
        teachers = [("--teacher-checkpoint", spec.checkpoint) for spec in self.config.all_teachers]
        return [*teachers, ("--student-checkpoint", self.config.student.checkpoint)]


@dataclass(frozen=True)
class TrainRequest(DistillRequest):
    """A new run on labels, without a teacher."""

    def __post_init__(self) -> None:
        network = self.config.student.name or self.config.student.checkpoint
        check_missing({"--model": network, "--data": self.config.data.source}, "--model resnet50 --data ./flowers")
        if network is None:
            raise UserError("no network: give --model NAME, any timm name such as resnet50")
        if hints := self.config.losses.hints():
            unset = ", ".join(f"losses.{name}" for name in hints)
            raise UserError(f"train learns from labels alone, and {unset} from a teacher: use irgdistill distill")
        super().__post_init__()

    @property
    def inputs(self) -> list[tuple[str, Path | None]]:
        return [("--checkpoint", self.config.student.checkpoint)]


@dataclass(frozen=True)
class ResumeRequest:
    """A run to resume."""

    path: Path
    changes: Mapping[str, Any] = field(default_factory=dict)
    """{"key.path": value} of settings that a resumed run may change."""
    previous: bool = False
    """Resume from the state before the last one."""
    gpus: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        allowed = changeable_on_resume()
        if fixed := sorted(key for key in self.changes if of_any_teacher(key) not in allowed):
            raise UserError(f"--resume cannot change {', '.join(fixed)}; it may change {', '.join(sorted(allowed))}")
        check_loggers(self.changes.get("runtime.loggers") or ())
        check_workers(self.gpus, self.backend)
        folder = RunFolder(self.path)
        if folder.summary.exists():
            raise UserError(f"{self.path} holds a finished run; there is nothing to resume")
        if not folder.state.exists() and not folder.previous_state.exists():
            raise UserError(folder.explain_missing_state())


@dataclass(frozen=True)
class CompareRequest:
    """One recipe trained by several methods and seeds."""

    methods: Sequence[str]
    seeds: int
    output: Path
    jobs: int = 1
    """Runs at once on one device."""
    together: bool = False
    """Train the methods of a seed in turns, on the same batches."""
    preset: str | None = None
    settings: Sequence[str] = ()
    flags: Mapping[str, Any] | None = None
    moved: Sequence[str] = ()
    """Options of `distill` that a resumed run takes too."""
    as_json: bool = False
    """Print the table as one JSON object."""
    finished: bool = False
    """Train nothing; make the table of the finished runs."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.jobs < 1:
            raise UserError(f"--seeds {self.seeds} --jobs {self.jobs}: both must be at least 1")
        if self.together and self.jobs > 1:
            raise UserError(f"--together trains all methods in one process; leave out --jobs {self.jobs}")
        if not self.methods:
            raise UserError("--methods names no method")
        load_config(self.preset, list(self.settings), self.flags)  # imports the plugins, which may register methods
        for method in self.methods:
            METHODS.find(method)
        for method in () if self.finished else self.methods:
            check_run(self.config(method))
        if self.together and (loggers := self.config(self.methods[0]).runtime.loggers):
            raise UserError(f"--log {','.join(loggers)} follows one run at a time; leave it or --together out")

    def config(self, method: str, seed: int | None = None) -> Config:
        """Settings of one run. A weight that is set applies only to the methods that have its term."""
        others = {term for known in METHODS.values() for term in known.weights} - set(METHODS[method].weights)
        flags = {**(self.flags or {}), "method": method, **{f"losses.{name}.weight": 0.0 for name in others}}
        if seed is not None:
            flags["seed"] = seed
        return load_config(self.preset, list(self.settings), flags)


@dataclass(frozen=True)
class CacheRequest:
    """A teacher cache."""

    config: Config
    output: Path
    views: int | None = None
    """Views of each image; None: the run's `data.views`, or 1."""
    store: str = "fp16"
    logits: str = "all"
    """`all`, or how many of the largest to keep."""

    def __post_init__(self) -> None:
        if self.views is not None and self.views < 1:
            raise UserError(f"--views {self.views}: expected at least 1")
        check_word("--store", self.store, STORES)
        if self.logits != "all" and not (self.logits.isdecimal() and int(self.logits)):
            raise UserError(f"--logits {self.logits}: expected all, or a number of classes")
        if not self.config.data.labels:
            check_without_labels(self.config)
        first = self.config.teacher
        needed = {"--teacher": first.name or first.checkpoint, "--data": self.config.data.source}
        check_missing(needed, "--teacher resnet50 --data ./imagenet")
        check_source(self.config.data)
        for spec in self.config.all_teachers:
            check_teacher(self.config.replaced({"teacher": spec}), "a cache")


@dataclass(frozen=True)
class ExportRequest:
    """A student to export."""

    target: str
    """Run folder or checkpoint."""
    format: str = "hub"
    output: Path | None = None
    overwrite: bool = False
    push: str | None = None
    """Repository on the Hub."""
    license: str | None = None
    opset: int | None = None
    raw_input: bool = False
    """Put the normalisation into the graph: images are RGB in [0, 1]."""
    check_images: int = 64
    data: DataConfig = field(default_factory=DataConfig)
    """Data of the check's images; only the keys in `given` replace those of the checkpoint."""
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_word("--format", self.format, EXPORTS)
        if self.check_images < 1:
            raise UserError(f"--check-images {self.check_images}: expected at least 1")
        needs = {
            "--push": ("hub",) if self.push is not None else None,
            "--license": ("hub",) if self.license is not None else None,
            "--opset": ("onnx",) if self.opset is not None else None,
            "--raw-input": ("onnx", "program") if self.raw_input else None,
        }
        for option, formats in needs.items():
            if formats is not None and self.format not in formats:
                raise UserError(f"{option} needs --format {' or '.join(formats)}, not with {self.format}")
        if Path(self.target).suffix in WEIGHTS:
            check_files(Path(self.target))
        if not Path(self.target).exists():
            raise UserError(f"{self.target} is neither a run folder nor a checkpoint file")


@dataclass(frozen=True)
class InspectRequest:
    """Networks whose graphs are compared."""

    config: Config
    given: frozenset[str] = frozenset()
    """Keys of `config` that the command line set."""
    target: str | None = None
    """Run folder or checkpoint."""
    compare: str | None = None
    """Another checkpoint of the same student."""
    images: int = 64
    split: str = "val"
    neighbours: int = 5
    format: str = "png"
    terminal: bool = False
    output: Path | None = None
    plan_only: bool = False
    """Show which stages match; needs no data and no weights."""
    as_json: bool = False

    @property
    def student_checkpoint(self) -> Path | None:
        return self.config.student.checkpoint

    @property
    def student_pretrained(self) -> bool:
        return self.config.student.pretrained

    def __post_init__(self) -> None:
        check_word("--format", self.format, FIGURES)
        check_word("--split", self.split, ("val", "train"))
        if not 2 <= self.images <= MAX_IMAGES:
            raise UserError(f"--images {self.images}: a graph has 2 to {MAX_IMAGES} images")
        if not 1 <= self.neighbours < self.images:
            raise UserError(
                f"--neighbours {self.neighbours}: expected 1 to {self.images - 1} (of --images {self.images})"
            )
        if self.plan_only and self.compare is not None:
            raise UserError("--plan-only shows one plan; leave out --compare")
        if self.target is None:
            if self.config.student.name is None and self.student_checkpoint is None:
                raise UserError(f"no student: {ADVICE}")
            if self.config.teacher.name is None and self.config.teacher.checkpoint is None:
                raise UserError(f"no teacher: {ADVICE}")
            if not self.plan_only:
                check_source(self.config.data)


@dataclass(frozen=True)
class DoctorRequest:
    """A diagnosis of the machine, and of a run planned for it."""

    config: Config
    planned: bool = False
    output: Path = Path("runs")
    gpus: str | None = None
    backend: str | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        check_workers(self.gpus, self.backend)
        if self.planned:
            check_run(self.config)
