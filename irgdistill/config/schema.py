"""The settings of a run: one class per section, each field with its unit, default and option. Imports no torch.

This is the only place where a setting is described: the options of the command line and of `irgdistill.distill`, and
the page of settings in the documentation, are made from it. A loss weight that is not set takes the method's value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from irgdistill.config.fields import (
    Count,
    Names,
    NonNegative,
    OneOf,
    Section,
    Share,
    Weight,
)
from irgdistill.config.flag import CHANGEABLE, DATA, MATCHING, METHOD, RUN, TRAINING, Flag
from irgdistill.config.losses import LossesConfig, declare_terms
from irgdistill.config.methods import AUTO, METHODS, TEACHER_KINDS
from irgdistill.config.networks import StudentConfig, TeacherConfig
from irgdistill.config.recipe import AugmentConfig, OptimConfig, ScheduleConfig


class PluginConfig(Section):
    path: Path
    """The Python file, absolute."""
    sha256: str
    """Checksum of its content; a file with another content is refused."""


class DataConfig(Section):
    source: Annotated[
        str | None,
        Flag("--data", DATA, "Image folder, .tar, {names}.", completion="source", metavar="DATA", common=True),
        CHANGEABLE,
    ] = None
    """Image folder, .tar of class folders, `digits`, or a timm dataset string (`torch/cifar10`, `hfds/…`, `wds/…`)."""
    root: Annotated[Path, Flag("--data-root", DATA, "Folder of a timm dataset's files.", metavar="DIR"), CHANGEABLE] = (
        Path("data")
    )
    """Folder in which a timm dataset string keeps its files."""
    download: Annotated[bool, Flag("--download", DATA, "Download a timm dataset.")] = False
    """Let a timm dataset string download its files."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Number of classes of a streamed data set that does not state it."""
    train_split: str | None = None
    """Name of the training split; default: `train`."""
    val_split: str | None = None
    """Name of the validation split; default: the first of `val`, `validation`, `test` that exists."""
    image_key: str | None = None
    """Column of the images in `hfds/…` (default: `image`), or their file endings in `wds/…` shards."""
    label_key: str | None = None
    """Column of the classes in `hfds/…` (default: `label`), or a field of the .json in `wds/…` shards."""
    labels: Annotated[
        bool, Flag("--no-labels", DATA, "Use any images, and learn from the teacher alone.", off=True, common=True)
    ] = True
    """Train on the labels. False: any images, no class folders; classes and targets come from the teacher."""
    exif_orientation: bool = True
    """Turn photos upright, as their EXIF data say. Runs and checkpoints written before this setting have it off."""
    labelled_fraction: Share | None = None
    """Class-balanced share of the training images whose labels are used; the others are seen by every term but
    cross-entropy, in which each labelled image counts for itself and its share of the others. Default: all."""
    balanced: Annotated[bool, Flag("--balanced", DATA, "Draw every class equally often.")] = False
    """Draw every class equally often; an epoch keeps its number of images."""
    val_fraction: Annotated[
        Share | None, Flag("--val-fraction", DATA, "Hold out this share for validation.", metavar="SHARE", common=True)
    ] = None
    """Class-balanced share of the training images that is held out if there is no validation split."""
    train_images: Count | None = None
    """Train on this many images only: the same for every seed, class-balanced if possible; default: all."""
    batch_size: Annotated[
        int, Field(ge=2), Flag("--batch-size", DATA, "Images per step and relation graph.", common=True)
    ] = 128
    """Images per training step, over all processes: the size of the relation graph."""
    eval_batch_size: Count = 256
    """Images per evaluation step."""
    workers: Annotated[
        int,
        Field(ge=0),
        Flag("--workers", DATA, "Loader processes; the result does not depend on them.", common=True),
        CHANGEABLE,
    ] = 1
    """Processes per GPU that decode and augment; the result does not depend on their number."""
    image_cache_gib: Annotated[Weight, CHANGEABLE] = 2.0
    """Limit in GiB up to which decoded images of at most 64 pixels are kept in memory; 0 is off."""
    views: Count | None = None
    """Number of augmented views of each image, one per epoch in turn; default: a new one every epoch."""
    second_view: str | None = None
    """timm policy of a second view of each image, such as `rand-m3-n1-inc1`, cropped and flipped like the first. Both
    count as images of a batch, so that it holds half as many different ones."""
    view_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the augmentation; default: the run's."""
    search_limit: Annotated[Count, CHANGEABLE] = 200_000
    """Files and folders that are no images, and few of them images, after which the search for images gives up."""
    max_bad_images: Annotated[int, Field(ge=0), Flag("--max-bad-images", DATA, "Unreadable images to skip.")] = 10
    """Unreadable images to skip, each with a warning, before the run stops."""


class MatchingConfig(Section):
    """Overrides of the matching by resolution."""

    levels: Annotated[Count | None, Flag("--levels", MATCHING, "Match by depth, in at most this many stages.")] = None
    """Match by depth, in at most this many stages."""
    skip: Annotated[
        tuple[int, ...], Flag("--skip-level", MATCHING, "Skip the resolution /N; may be repeated.", repeated=True)
    ] = ()
    """Resolutions to skip, as reductions of the input: 4 is /4."""
    taps_teacher: Annotated[
        Names, Flag("--taps-teacher", MATCHING, "Blocks that end the teacher's stages: NAME,NAME.", metavar="A,B,C")
    ] = ()
    """Blocks that end the teacher's stages, in order of depth."""
    taps_student: Annotated[
        Names, Flag("--taps-student", MATCHING, "Blocks that end the student's stages: NAME,NAME.", metavar="A,B,C")
    ] = ()
    """Blocks that end the student's stages, in order of depth."""


class RuntimeConfig(Section):
    device: Annotated[
        str, Flag("--device", RUN, "auto, cpu, cuda, cuda:1, ….", metavar="DEVICE", common=True), CHANGEABLE
    ] = "auto"
    """`auto`: CUDA if there is a GPU, else the CPU."""
    amp: Annotated[
        Literal["auto", "none", "bf16", "fp16"],
        Flag("--amp", RUN, "auto, none, bf16 or fp16.", metavar="PRECISION", common=True),
    ] = "auto"
    """Autocast precision; a run remembers what `auto` was. `auto`: bf16 on CUDA (fp16 on GPUs without units for it), on
    a CPU bf16 if it has instructions for it and the networks are faster with it. Relations are always in float32."""
    channels_last: Annotated[bool, Flag("--channels-last", RUN, "Use the channels-last memory format.")] = False
    """Keep both networks' maps in channels-last format: faster for most convolutional networks."""
    fold_batch_norm: bool = True
    """Fold the teacher's batch norms into its convolutions if its logits stay the same to 1e-4."""
    deterministic: bool = False
    """On GPUs, compute by deterministic algorithms: a resumed run is bit for bit the undisturbed one, as it always is
    on the CPU, and somewhat slower."""
    compile: Annotated[bool, Flag("--compile", RUN, "Use torch.compile.")] = False
    """Run both networks, and in a single process the loss, through `torch.compile`."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """Mode of `torch.compile`; `reduce-overhead` records CUDA graphs, for small networks on a large GPU."""
    graph_scope: Annotated[
        Literal["global", "local"], Flag("--graph-scope", RUN, "global, or local to each process.", metavar="SCOPE")
    ] = "global"
    """Images that relations span on several processes: those of all, or of each process alone."""
    sync_bn: Annotated[bool, Flag("--sync-bn", RUN, "Batch-norm statistics over all processes.")] = False
    """Compute batch-norm statistics over all processes; otherwise each has its own, averaged after every epoch."""
    log_every: Count = 50
    """Updates between two records in metrics.jsonl."""
    gradient_shares_every: Annotated[int, Field(ge=0)] = 200
    """Updates between two samples of each term's share of the student's gradient norm; 0 is off."""
    loggers: Annotated[
        tuple[str, ...],
        Flag("--log", RUN, "Logger ({names}); may be repeated.", completion="logger", repeated=True, metavar="LOGGER"),
        CHANGEABLE,
    ] = ()
    """Loggers that also get the records of metrics.jsonl: `mlflow`, `tensorboard`, `wandb`."""
    graph_images_every: Annotated[int, Field(ge=0), CHANGEABLE] = 0
    """Epochs between two images of both networks' graphs for the loggers; 0 is off."""
    save_every_steps: Annotated[
        int, Field(ge=0), Flag("--save-every-steps", RUN, "Also save after this many updates; 0 is off."), CHANGEABLE
    ] = 0
    """Updates between two saves of the state, besides that at the end of every epoch; 0 is off."""
    save_every_minutes: Annotated[
        NonNegative,
        Flag("--save-every-minutes", RUN, "Also save after this many minutes; 0 is off.", metavar="MINUTES"),
        CHANGEABLE,
    ] = 0
    """Minutes between two saves of the state, besides that at the end of every epoch; 0 is off."""


class Config(Section):
    """Everything that defines a run."""

    method: Annotated[
        str,
        BeforeValidator(OneOf(METHODS)),
        Flag(
            "--method",
            METHOD,
            "auto, irg+kd+at, encoder, kd, none, ….",
            completion="method",
            metavar="METHOD",
            common=True,
        ),
    ] = AUTO
    """Named set of loss weights. `auto`: `irg+kd+at` if the teacher has the data's classes, else `encoder`."""
    seed: Annotated[
        int, Field(ge=0, lt=2**31), Flag("--seed", TRAINING, "Seed of weights, order and augmentation.", common=True)
    ] = 0
    """Seed of initial weights, data order and augmentation."""
    plugins: Annotated[
        tuple[PluginConfig, ...],
        Flag(
            "--plugin",
            RUN,
            "Python file that adds terms, methods, data sources or loggers; may be repeated.",
            repeated=True,
            metavar="FILE",
        ),
    ] = ()
    """Python files that register terms, methods, data sources or loggers: paths, or a path with its sha256."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    teachers: tuple[TeacherConfig, ...] = ()
    """Further teachers, each with the settings of the section `teacher`: `teachers.0.name` is the second teacher's."""
    student: StudentConfig = Field(default_factory=StudentConfig)
    matching: MatchingConfig = Field(default_factory=MatchingConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    losses: LossesConfig = Field(default_factory=LossesConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @model_validator(mode="after")
    def _fill_weights(self) -> Config:
        if self.method != AUTO:
            filled = self.losses.filled(METHODS[self.method], self.data.labels)
            object.__setattr__(self, "losses", filled)  # frozen from here on
        return self

    def with_method(self, name: str) -> Config:
        """The same run with the method that `auto` stands for; a run with another method does not change."""
        if self.method != AUTO:
            return self
        return self.replaced({"method": name, "losses": self.losses.filled(METHODS[name], self.data.labels)})

    @property
    def left_open(self) -> frozenset[str]:
        """Keys of the settings that a run chooses when it starts: its precision, the recipe by its student, and the
        views of a teacher cache.
        """
        optim, cached = self.optim, any(teacher.cache is not None for teacher in self.all_teachers)
        is_open = {
            "runtime.amp": self.runtime.amp == "auto",
            "optim.name": optim.name == "auto",
            "optim.lr": optim.lr is None,
            "optim.weight_decay": optim.weight_decay is None,
            "schedule.warmup_epochs": self.schedule.warmup_epochs is None,
            "data.views": cached and self.data.views is None,
            "data.view_seed": cached and self.data.view_seed is None,
            "data.exif_orientation": cached and "exif_orientation" not in self.data.model_fields_set,
        }
        return frozenset(key for key, value in is_open.items() if value)

    @property
    def all_teachers(self) -> tuple[TeacherConfig, ...]:
        """The first teacher and the further ones."""
        return (self.teacher, *self.teachers)

    @property
    def uses_teacher(self) -> bool:
        """Whether any term compares outputs of the trained teacher."""
        return self.method == AUTO or bool(self.losses.comparing(*TEACHER_KINDS))


def refresh() -> None:
    """Bring the section `losses` up to date with the registered terms. Raises UserError for a method without them."""
    if declare_terms() and Config.__pydantic_complete__:
        Config.model_rebuild(force=True)


STORES = ("fp16", "fp32")
"""Number formats of a teacher cache."""
