"""The settings of how a network is trained: augmentation, optimizer, schedule. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from irgdistill.config.fields import Count, NonNegative, Positive, Probability, Range, Section, Share, Weight
from irgdistill.config.flag import TRAINING, Flag

Beta = Annotated[float, Field(ge=0, lt=1)]


class AugmentConfig(Section):
    crop: Literal["auto", "pad", "resized", "none"] = "auto"
    """`pad`: zero-padded random crop (CIFAR style); `resized`: random resized crop; `auto`: `pad` up to 64 pixels."""
    padding: Annotated[int, Field(ge=0)] | None = None
    """Pixels on each side for `pad`; default: one eighth of the input size."""
    scale: Range = (0.08, 1.0)
    """Range of the random resized crop's area, as shares of the image."""
    ratio: Range = (0.75, 4 / 3)
    """Range of the random resized crop's aspect ratio."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    color_jitter: NonNegative = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    auto_augment: Annotated[
        str | None, Flag("--auto-augment", TRAINING, "timm policy, such as rand-m9-mstd0.5.", metavar="POLICY")
    ] = None
    """timm policy string, such as `rand-m9-mstd0.5`."""
    erase: Probability = 0.0
    """Probability of random erasing."""
    mixup: Annotated[NonNegative, Flag("--mixup", TRAINING, "Alpha of mixup; 0 is off.", metavar="ALPHA")] = 0.0
    """Alpha of mixup; 0 is off. Both networks see the mixed images."""
    cutmix: Annotated[NonNegative, Flag("--cutmix", TRAINING, "Alpha of cutmix; 0 is off.", metavar="ALPHA")] = 0.0
    """Alpha of cutmix; 0 is off."""
    mix_prob: Probability = 1.0
    """Probability that a batch is mixed."""


class OptimConfig(Section):
    name: Annotated[
        str,
        Flag("--opt", TRAINING, "timm optimizer; auto: AdamW for transformers, else SGD.", metavar="NAME", common=True),
    ] = "auto"
    """Optimizer of timm's factory (`sgd` uses Nesterov momentum, `momentum` is SGD without it). `auto`: `adamw` for
    networks with attention, or with more layer norms than batch norms (mixers, ConvNeXt), else `sgd`."""
    lr: Annotated[
        Positive | None,
        Flag("--lr", TRAINING, "Peak learning rate; default: by the optimizer.", metavar="RATE", common=True),
    ] = None
    """Peak learning rate; not scaled with the batch. Default: 0.1 for SGD; for other optimizers 5e-4 · √(N / 512) with
    N images per update."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum, for optimizers that have one."""
    betas: Annotated[tuple[Beta, ...], Field(min_length=2, max_length=3)] | None = None
    """Decays of the averages of optimizers that have them, such as `[0.9, 0.95]` for AdamW, two or three; default: the
    optimizer's own."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of the learning rate from each layer of the student to the one before it, by timm's groups of layers: 0.75
    fine-tunes a pretrained transformer. The classifier, and what some terms train beside the student, have the full
    rate. Default: one rate for all."""
    weight_decay: Annotated[
        Weight | None,
        Flag(
            "--weight-decay", TRAINING, "Not applied to biases and norms; default: by the optimizer.", metavar="DECAY"
        ),
    ] = None
    """Weight decay; not applied to biases and normalisation layers, as in timm, unless `decay_all` is set. Default:
    5e-4 for SGD, 0.05 for other optimizers."""
    decay_all: bool = False
    """Apply weight decay to biases and normalisation layers too."""
    clip_grad: Annotated[Positive | None, Flag("--clip-grad", TRAINING, "Maximum gradient norm.", metavar="NORM")] = (
        None
    )
    """Maximum norm of the student's gradient."""
    accumulate: Annotated[Count, Flag("--accumulate", TRAINING, "Batches per update.")] = 1
    """Batches per update. Relations span one batch, not the accumulated ones."""
    ema: Annotated[
        Share | None, Flag("--ema", TRAINING, "Decay of averaged weights, such as 0.999.", metavar="DECAY")
    ] = None
    """Decay of an exponential moving average of the weights, which is then evaluated and saved."""


class ScheduleConfig(Section):
    name: Literal["cosine", "multistep", "step", "poly", "tanh", "none"] = "cosine"
    """Schedule of timm's factory, stepped per update; `none`: constant after the warm-up."""
    epochs: Annotated[
        int,
        Field(ge=0),
        Flag("--epochs", TRAINING, "Training epochs; 0: only evaluate.", metavar="EPOCHS", common=True),
    ] = 100
    """Passes over the training images, including the warm-up. 0: train nothing, only evaluate teacher and student."""
    patience: Annotated[
        Count | None,
        Flag("--patience", TRAINING, "Stop after this many epochs without a better result.", metavar="EPOCHS"),
    ] = None
    """Epochs without a better value of the metric that selects the best weights, after which the run ends. The schedule
    stays that of all `epochs`. Default: never."""
    warmup_epochs: Annotated[
        NonNegative | None,
        Flag("--warmup-epochs", TRAINING, "Linear warm-up; default: by the optimizer.", metavar="EPOCHS"),
    ] = None
    """Length of the linear warm-up in epochs. Default: 0 for SGD; for other optimizers a tenth of the epochs, at most
    5."""
    warmup_lr: NonNegative = 1e-5
    """Learning rate at which the warm-up begins."""
    min_lr: NonNegative = 0.0
    """Learning rate at which `cosine`, `poly` and `tanh` end."""
    milestones: tuple[int, ...] = ()
    """Epochs at which `multistep` decays."""
    decay_epochs: Positive = 30
    """Epochs between two decays of `step`."""
    decay_rate: Positive = 0.1
    """Factor of each decay of `step` and `multistep`; the power of `poly`, as in timm."""
