"""Builds optimizer, schedule and mixup from settings, through timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import Optimizer

from irgdistill.config import AugmentConfig, OptimConfig, ScheduleConfig
from irgdistill.errors import TrainingError, UserError, nearest, one_line


def build_optimizer(model: nn.Module, config: OptimConfig, adapters: nn.Module | None = None) -> Optimizer:
    """An optimizer of the student and of what is trained beside it.

    There is no weight decay on biases and norms, unless `decay_all` is set. With `layer_decay`, groups of earlier
    layers have a smaller rate, which timm's schedules keep smaller. Raises UserError: an unknown name, or betas that
    the optimizer does not have.
    """
    known = [str(name) for name in list_optimizers()]
    if config.name not in known:
        raise UserError(f"unknown optimizer {config.name!r}{nearest(config.name, known)}")
    decay = config.weight_decay or 0.0
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": decay, "momentum": config.momentum}
    if config.betas is not None:
        info = get_optimizer_info(config.name)
        if not info.has_betas or info.num_betas != len(config.betas):
            has = f"has {info.num_betas}" if info.has_betas else "has none"
            raise UserError(f"optim.betas gives {len(config.betas)} betas, and {config.name} {has}")
        options["betas"] = config.betas
    try:
        optimizer: Optimizer = create_optimizer_v2(
            model,
            opt=config.name,
            filter_bias_and_bn=not config.decay_all,
            layer_decay=config.layer_decay,
            **options,
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"optimizer {config.name!r} does not work here: {' '.join(str(error).split())[:160]}") from None
    for group in [] if adapters is None else _groups(adapters, config):
        if group["params"]:
            optimizer.add_param_group(group)
    return optimizer


def _groups(adapters: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    decay = config.weight_decay or 0.0
    if config.decay_all:
        return [{"params": list(adapters.parameters()), "weight_decay": decay}]
    groups: list[dict[str, Any]] = param_groups_weight_decay(adapters, decay)
    return groups


class WatchedOptimizer:
    """An optimizer for `GradScaler`, which does not tell whether it steps it: `stepped` is False for a skipped step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.param_groups, self.stepped = optimizer, optimizer.param_groups, False

    def step(self) -> None:
        self.optimizer.step()
        self.stepped = True


def scaled_step(scaler: torch.amp.GradScaler, optimizer: WatchedOptimizer, name: str, update: int) -> None:
    """Step the optimizer called `name`. Raises TrainingError if it fails, as with a state that does not fit."""
    try:
        scaler.step(optimizer)  # type: ignore[arg-type]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise TrainingError(
            f"the optimizer {name} fails at update {update}: "
            f"{one_line(error, 200)}; a resumed run may have a state that does not fit"
        ) from error


MOST_SKIPPED = 32
"""Steps in a row that the scaler may skip, halving its scale each time: from 65,536 to 2⁻¹⁶."""


def refuse_skipped(count: int, update: int) -> None:
    """Raises TrainingError if the scaler has skipped `update` MOST_SKIPPED times."""
    if count >= MOST_SKIPPED:
        raise TrainingError(
            f"the gradients of update {update} are not finite, {count} times in a row, "
            "whatever the scale of the loss in fp16; --amp bf16 or none may help"
        )


def build_scheduler(optimizer: Optimizer, config: ScheduleConfig, updates_per_epoch: int) -> Any:
    """A timm scheduler that depends on the update alone: `step_update(n)` sets the learning rate of update n."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="multistep" if config.name == "none" else config.name,
        num_epochs=max(config.epochs, 1),
        decay_epochs=config.decay_epochs,
        decay_milestones=list(config.milestones) if config.name == "multistep" else [],
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs or 0.0,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    scheduler.step_update(0)
    return scheduler


def build_mixup(config: AugmentConfig, batch_size: int, num_classes: int) -> Any:
    """timm's mixup and cutmix on a batch of raw images; None if both are off. Raises UserError for an odd batch."""
    if config.mixup == 0 and config.cutmix == 0:
        return None
    if batch_size % 2:
        raise UserError(f"mixup pairs images: --batch-size {batch_size} must be even")
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mix_prob,
        label_smoothing=0.0,  # the cross-entropy term smooths
        num_classes=num_classes,
    )
