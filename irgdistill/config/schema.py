"""The settings of a run: one class per section, each field with its unit and default. Imports no torch.

A loss weight left unset takes the value that the method gives it (`METHODS`); `config` says where settings come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from irgdistill.config.fields import Names, OneOf, Probability, Range, Section, Size, Weight
from irgdistill.config.losses import LossesConfig, declare_terms
from irgdistill.config.methods import METHODS, TEACHER_KINDS

MOVABLE = {
    *("data.source", "data.root", "data.workers", "data.hold_gib", "teacher.checkpoint", "teacher.cache"),
    *("runtime.device", "runtime.save_every_steps", "runtime.save_every_minutes"),
    *("runtime.loggers", "runtime.graph_images_every"),
}
"""What may change when a run goes on: where things are and when it is saved, never what is computed."""


class PluginConfig(Section):
    path: Path
    """The Python file, absolute."""
    sha256: str
    """Checksum of its content; a file with another content is refused."""


class TeacherConfig(Section):
    name: str | None = None
    """timm name, `hf-hub:…` or `local-dir:…`. Not needed with a checkpoint of ours, which names its architecture."""
    checkpoint: Path | None = None
    """Weights: safetensors, or a .pth read with `weights_only=True`. Without it the teacher is pretrained."""
    input_size: Size | None = None
    """Height and width in pixels; default: what the teacher was trained on."""
    cache: Path | None = None
    """What `cache-teacher` wrote: it answers in the teacher's place."""
    check: bool = True
    """Evaluate the teacher before training and stop when it is near chance."""


class Preprocessing(Section):
    mean: tuple[float, ...]
    """Of each channel, for pixels in 0 to 1."""
    std: tuple[float, ...]
    """Of each channel, likewise."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]
    """`bilinear`, `bicubic`, … as timm names them."""
    crop_pct: float
    """Share of the resized image that validation crops."""


class StudentConfig(Section):
    name: str | None = None
    """timm name of the network to train. Not needed with a checkpoint of ours, which names its architecture."""
    pretrained: bool = False
    """Start from timm's pretrained weights, unless there is a checkpoint; with a new classifier where the number of
    classes differs."""
    checkpoint: Path | None = None
    """Start from these weights, classifier as above: a checkpoint or run folder of ours, or a file of timm's."""
    preprocessing: Preprocessing | None = None
    """How images are brought into the network's form; default: as the network or the checkpoint says."""
    input_size: Size | None = None
    """Height and width in pixels; default: the network's own."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping them; batch norm then counts each batch twice."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as drop_path_rate."""


class DataConfig(Section):
    source: str | None = None
    """Image folder, .tar of class folders, `digits`, or a timm dataset string (`torch/cifar10`, `hfds/…`, `wds/…`)."""
    root: Path = Path("data")
    """Where a timm dataset string keeps its files."""
    download: bool = False
    """Let a timm dataset string fetch its files."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Classes of a streamed data set that does not tell them."""
    train_split: str | None = None
    """Name of the training split; default `train`."""
    val_split: str | None = None
    """Name of the validation split; default: the first of `val`, `validation`, `test` that is there."""
    image_key: str | None = None
    """Column of the images in `hfds/…` (default `image`), or their endings in `wds/…` shards."""
    label_key: str | None = None
    """Column of the classes in `hfds/…` (default `label`), or a field of the .json in `wds/…` shards."""
    labels: bool = True
    """Train on the labels. False: any images, no class folders; classes and targets come from the teacher."""
    balanced: bool = False
    """Draw every class equally often; an epoch keeps its number of images."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Class-balanced share of the training images held out for validation, where there is no validation split."""
    train_images: Annotated[int, Field(ge=1)] | None = None
    """Train on this many images only, the same for every seed, as many of each class as can be; default: all."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per training step, over all processes: the size of the relation graph."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 256
    """Images per evaluation step."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Processes that decode and augment, for each GPU; the result does not depend on their number."""
    hold_gib: Weight = 2.0
    """Images of up to 64 pixels are held decoded in memory where they take no more GiB than this; 0 is off."""
    views: Annotated[int, Field(ge=1)] | None = None
    """Augmented views of each image that an epoch each shows in turn; default: a new one every epoch."""
    view_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the augmentation; default: the run's."""
    max_bad_images: Annotated[int, Field(ge=0)] = 10
    """Unreadable images to skip, each named, before the run stops."""


class MatchingConfig(Section):
    """Overrides of what is otherwise matched by resolution."""

    levels: Annotated[int, Field(ge=1)] | None = None
    """Match by depth, in at most this many stages."""
    skip: tuple[int, ...] = ()
    """Relative resolutions to leave out, as reductions: 4 is /4."""
    taps_teacher: Names = ()
    """Blocks at which the teacher's stages end, in order of depth."""
    taps_student: Names = ()
    """Blocks at which the student's stages end, in order of depth."""


class AugmentConfig(Section):
    crop: Literal["auto", "pad", "resized", "none"] = "auto"
    """`pad`: zero-padded random crop (CIFAR style); `resized`: random resized crop; `auto`: `pad` up to 64 pixels."""
    padding: Annotated[int, Field(ge=0)] | None = None
    """Pixels on each side for `pad`; default: one eighth of the input size."""
    scale: Range = (0.08, 1.0)
    """Area range of the random resized crop."""
    ratio: Range = (0.75, 4 / 3)
    """Aspect range of the random resized crop."""
    hflip: Probability = 0.5
    """Probability of a mirror image."""
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    auto_augment: str | None = None
    """timm policy string, such as `rand-m9-mstd0.5`."""
    erase: Probability = 0.0
    """Probability of random erasing."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup; 0 is off. Both networks see the mixed images."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of cutmix; 0 is off."""
    mix_prob: Probability = 1.0
    """Probability that a batch is mixed."""


class OptimConfig(Section):
    name: str = "sgd"
    """Optimizer of timm's factory (`sgd` is Nesterov's)."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate, as given: not scaled with the batch."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of optimizers that have one."""
    weight_decay: Weight = 5e-4
    """Not applied to biases and normalisation, as in timm."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Maximum norm of the student's gradient."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches per update. Relations span one batch, not the accumulated ones."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights; it is what is evaluated and saved."""


class ScheduleConfig(Section):
    name: Literal["cosine", "multistep", "step", "poly", "tanh", "none"] = "cosine"
    """Schedule of timm's factory, stepped per update; `none` keeps the learning rate after the warm-up."""
    epochs: Annotated[int, Field(ge=1)] = 100
    """Passes over the training images, warm-up included."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    """Length of the linear warm-up."""
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate at which the warm-up begins."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at which `cosine`, `poly` and `tanh` end."""
    milestones: tuple[int, ...] = ()
    """Epochs at which `multistep` decays."""
    decay_epochs: Annotated[float, Field(gt=0)] = 30
    """Interval of `step`."""
    decay_rate: Annotated[float, Field(gt=0)] = 0.1
    """Factor of each decay of `step` and `multistep`; the power of `poly`, as in timm."""


class RuntimeConfig(Section):
    device: str = "auto"
    """`auto`: CUDA where there is one, else the CPU."""
    amp: Literal["auto", "none", "bf16", "fp16"] = "auto"
    """Autocast precision; `auto`: bf16 on CUDA, none on the CPU. Relations are computed in float32 in any case."""
    channels_last: bool = False
    """Keep both networks' maps with their channels last: faster for most convolutional networks."""
    fold: bool = True
    """Fold the teacher's batch norms into its convolutions, where its logits stay the same to 1e-4."""
    compile: bool = False
    """Run both networks, and in a single process the loss, through `torch.compile`."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """Of `torch.compile`; `reduce-overhead` records CUDA graphs, for small networks on a large GPU."""
    graph_scope: Literal["global", "local"] = "global"
    """On many processes, the images that relations span: those of all, or of each process alone."""
    sync_bn: bool = False
    """On many processes, batch-norm statistics over the images of all; otherwise each has its own, averaged at the
    end of every epoch."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Updates between two records in metrics.jsonl."""
    share_every: Annotated[int, Field(ge=0)] = 200
    """Updates between two samples of each term's share of the student's gradient norm; 0 is off."""
    loggers: tuple[str, ...] = ()
    """Loggers that also get the records of metrics.jsonl: `tensorboard`, `wandb`."""
    graph_images_every: Annotated[int, Field(ge=0)] = 0
    """Epochs between two pictures of both networks' graphs for the loggers; 0 is off."""
    save_every_steps: Annotated[int, Field(ge=0)] = 0
    """Updates between two saves of the state, beside that at the end of every epoch; 0 is off."""
    save_every_minutes: Annotated[float, Field(ge=0)] = 0
    """Minutes after which the state is saved, whatever the epoch; 0 is off."""


class Config(Section):
    """Everything that defines a run."""

    method: Annotated[str, BeforeValidator(OneOf(METHODS))] = "irg+kd+at"
    """Which hints are on; see `METHODS`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Initial weights, data order and augmentation."""
    plugins: tuple[PluginConfig, ...] = ()
    """Python files that register terms, methods, data sources or loggers: paths, or a path with its sha256."""
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    matching: MatchingConfig = MatchingConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    losses: LossesConfig = Field(default_factory=LossesConfig)
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _fill_weights(self) -> Config:
        filled = self.losses.filled(METHODS[self.method], self.data.labels)
        object.__setattr__(self, "losses", filled)  # frozen from here on
        return self

    @property
    def uses_teacher(self) -> bool:
        """Whether any term compares outputs of the trained teacher."""
        return bool(self.losses.comparing(*TEACHER_KINDS))


def refresh() -> None:
    """Bring the section `losses` up to date with the registered terms. Raises UserError for a method without them."""
    if declare_terms():
        Config.model_rebuild(force=True)


refresh()


STORES = ("fp16", "fp32")
"""How a teacher cache may hold its numbers."""
