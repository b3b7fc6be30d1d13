"""The settings of how a network is trained: augmentation, optimizer, schedule. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from irgdistill.config.fields import Count, NonNegative, Positive, Probability, Range, Section, Share, Weight
from irgdistill.config.flag import TRAINING, Flag


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
    name: Annotated[str, Flag("--opt", TRAINING, "timm optimizer.", metavar="NAME", common=True)] = "sgd"
    """Optimizer of timm's factory (`sgd` uses Nesterov momentum, `momentum` is SGD without it)."""
    lr: Annotated[Positive, Flag("--lr", TRAINING, "Peak learning rate.", metavar="RATE", common=True)] = 0.1
    """Peak learning rate; not scaled with the batch."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum, for optimizers that have one."""
    weight_decay: Annotated[
        Weight, Flag("--weight-decay", TRAINING, "Weight decay; not applied to biases and norms.", metavar="DECAY")
    ] = 5e-4
    """Weight decay; not applied to biases and normalisation layers, as in timm, unless `decay_all` is set."""
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
        Count, Flag("--epochs", TRAINING, "Passes over the training images.", metavar="EPOCHS", common=True)
    ] = 100
    """Passes over the training images, including the warm-up."""
    warmup_epochs: Annotated[
        NonNegative, Flag("--warmup-epochs", TRAINING, "Length of the linear warm-up.", metavar="EPOCHS")
    ] = 0
    """Length of the linear warm-up in epochs."""
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
