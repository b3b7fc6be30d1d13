"""Chooses by the student what is left open of its recipe: optimizer, learning rate, weight decay, warm-up."""

from __future__ import annotations

from math import sqrt

from timm.layers import GroupNorm1, RmsNorm, RmsNorm2d, RmsNormFp32
from torch import nn

from irgdistill.config import Config

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm, GroupNorm1, RmsNorm, RmsNorm2d, RmsNormFp32)
"""Layers that normalise all channels of an image or token together."""


SGD = ("sgd", "momentum", "nesterov")


def with_recipe(config: Config, student: nn.Module) -> tuple[Config, str]:
    """The configuration with a value for what it leaves open, and a line for the log if a rate was chosen.

    A network with attention, or with more layer norms than batch norms (mixers, ConvNeXt), is trained by AdamW: SGD at
    its usual rate diverges there, also in transformers of batch norms such as LeViT. Any other is trained by SGD. The
    other settings follow from the optimizer, given or chosen. For SGD they are common practice. For others they are
    those of DeiT (Touvron et al. 2021): the rate is 5e-4 at 512 images per update, here scaled by the square root of
    the images, as in timm's training script.
    """
    optim, adaptive = config.optim, needs_adamw(student)
    name = optim.name if optim.name != "auto" else "adamw" if adaptive else "sgd"
    rate, decay, warmup = 0.1, 5e-4, 0.0
    if name not in SGD:
        images = config.data.batch_size * optim.accumulate
        rate, decay, warmup = float(f"{5e-4 * sqrt(images / 512):.3g}"), 0.05, min(5.0, config.schedule.epochs / 10)
    recipe = {
        "optim.name": name,
        "optim.lr": rate,
        "optim.weight_decay": decay,
        "schedule.warmup_epochs": warmup,
    }
    chosen = {key: value for key, value in recipe.items() if key in config.left_open}
    config = config.replaced(chosen)
    if not {"optim.name", "optim.lr"} & set(chosen):
        return config, ""
    optim, warmup = config.optim, config.schedule.warmup_epochs or 0.0
    line = f"recipe: {name}, learning rate {optim.lr:g}, weight decay {optim.weight_decay:g}"
    line += f", {warmup:g} epochs of warm-up" if warmup else ""
    if "optim.name" in chosen:
        network = "network with attention or layer norms" if adaptive else "convolutional network"
        line += f", for a {network} (--opt {'sgd' if adaptive else 'adamw'} for the other recipe)"
    return config, line


def needs_adamw(model: nn.Module) -> bool:
    """Whether a network has attention, by the names of its layers' classes, or more layer norms than batch norms."""
    modules = list(model.modules())
    if any("Attention" in type(module).__name__ for module in modules):
        return True
    batch = sum(isinstance(module, BATCH_NORMS) for module in modules)
    return sum(isinstance(module, LAYER_NORMS) for module in modules) > batch
