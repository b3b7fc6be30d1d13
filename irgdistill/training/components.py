"""Builds what a run is made of on this process's device: loss, networks, loaders, optimizer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from irgdistill.config import Config
from irgdistill.data import KeptLoader, Loader, TurnLoader, UnreadableImages, eval_loader, train_loader
from irgdistill.errors import UserError
from irgdistill.io import Report
from irgdistill.losses import Counterpart, DistillLoss, build_loss
from irgdistill.matching import Tapped
from irgdistill.runtime import (
    World,
    autocast,
    choose_device,
    gpu_settings,
    renew_statistics,
    slow_precision,
)
from irgdistill.training.held_out import HELD_OUT_IMAGES, HeldOutGraph
from irgdistill.training.networks import build_networks, tapped
from irgdistill.training.optimization import build_mixup, build_optimizer, build_scheduler
from irgdistill.training.precision import precision_of
from irgdistill.training.setup import Setup
from irgdistill.training.shared import SharedParts
from irgdistill.training.state import SavedState
from irgdistill.training.teachers import Teachers


@dataclass(frozen=True, kw_only=True)
class RunComponents:
    """Networks, loss, data and optimizer of a run, on one process's device."""

    setup: Setup
    world: World
    device: torch.device
    autocast: AbstractContextManager[Any]
    loss: DistillLoss
    student: Tapped
    """The student with its taps. `student.model` is the plain timm model."""
    adapters: nn.ModuleDict
    """Modules that some terms train with the student."""
    trained: nn.Module
    """Student and adapters as a step runs them: compiled, and wrapped in DDP, where that is asked for."""
    evaluated: Tapped
    """The network that is evaluated and saved: the average of the weights if there is one, else the student."""
    held_out: HeldOutGraph | None
    """Evaluates a student without a classifier."""
    ema: ModelEmaV3 | None
    teacher: Teachers | None
    """None for a method without a teacher."""
    train: Loader | TurnLoader
    validation: Loader | KeptLoader
    unreadable: UnreadableImages
    mixup: Any
    """timm's mixup, None if it is off."""
    optimizer: Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    batches: int
    """Batches of an epoch, a multiple of `accumulate`."""
    data_facts: dict[str, Any]
    """Numbers of images, and class names: a run resumes only on data with the same."""

    @property
    def config(self) -> Config:
        return self.setup.config

    @property
    def accumulate(self) -> int:
        """Batches of an update."""
        return self.config.optim.accumulate

    @property
    def projector(self) -> nn.Module | None:
        """The layer from the student's to the first teacher's embeddings, if a term trains one."""
        linear = "embedding.0.linear" if self.config.teachers else "embedding.linear"
        return self.adapters.get_submodule(linear) if "embedding" in self.adapters else None

    @property
    def updates(self) -> int:
        """Updates of the whole run, or of one epoch for a run of 0 epochs."""
        return max(self.config.schedule.epochs, 1) * (self.batches // self.accumulate)

    @property
    def local_models(self) -> list[nn.Module]:
        """Models whose batch-norm statistics each process gathers for itself."""
        if self.config.runtime.sync_bn:
            return []
        return [self.student.model, *([] if self.ema is None else [self.ema.module])]

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and scaler, under the names of the state on disk."""
        return {
            "student": self.student.model.state_dict(),
            "adapters": self.adapters.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: SavedState) -> None:
        """Restore what `state_dict` gave. Raises what torch raises for a state that does not fit."""
        self.student.model.load_state_dict(state.student)
        self.adapters.load_state_dict(state.adapters)
        if self.ema is not None:
            self.ema.load_state_dict(state.ema or {})
        self.optimizer.load_state_dict(state.optimizer)
        self.scaler.load_state_dict(state.scaler)


def build_components(setup: Setup, world: World, report: Report, shared: SharedParts | None = None) -> RunComponents:
    """Build a run on the device of this process. Raises UserError for settings that cannot work.

    `shared`: what other runs use too; its caches are left to be opened.
    """
    device = choose_device(setup.config.runtime.device, world.local_rank)
    with gpu_settings(device, setup.config.runtime.deterministic):
        return _build_components(setup, device, world, report, shared)


def _build_components(
    setup: Setup, device: torch.device, world: World, report: Report, shared: SharedParts | None
) -> RunComponents:
    setup = replace(setup, config=_with_precision(setup, device, world, report))
    config = setup.config
    loss = _build_loss(setup, device, world, report)
    networks = build_networks(setup, loss, device, world, shared)
    data = _build_data(setup, networks["teacher"], device, world, report, shared)
    renew_statistics(networks["student"].model, data["batches"])
    precision = autocast(config.runtime.amp, device)
    optimizer = build_optimizer(networks["student"].model, config.optim, networks["adapters"])
    updates_per_epoch = data["batches"] // config.optim.accumulate
    return RunComponents(
        setup=setup,
        world=world,
        device=device,
        autocast=precision,
        held_out=_held_out(setup, networks["teacher"], device, data["unreadable"], precision, world, shared),
        loss=loss,
        **networks,
        **data,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.schedule, updates_per_epoch),
        scaler=torch.amp.GradScaler(device.type, enabled=config.runtime.amp == "fp16"),
    )


def _with_precision(setup: Setup, device: torch.device, world: World, report: Report) -> Config:
    """The configuration with the precision that `auto` is here, the same in all processes."""
    config, asked = setup.config, setup.config.runtime.amp
    amp = world.broadcast(precision_of(setup, device) if world.main else asked)
    if amp != asked and amp != "none":
        report.line(f"precision {amp}, the fastest of {device.type} here (--amp auto)")
    if device.type == "cuda":
        report.line("deterministic algorithms" if config.runtime.deterministic else "cuDNN searches its fastest ones")
    if world.main and (slow := slow_precision(amp, device)):
        report.warn(slow)
    return config.replaced({"runtime.amp": amp})


def _build_loss(setup: Setup, device: torch.device, world: World, report: Report) -> DistillLoss:
    config, booster = setup.config, setup.booster
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed + 1)  # adapters start alike under a live and a cached teacher
        loss = build_loss(
            config.losses,
            setup.plan,
            world if config.runtime.graph_scope == "global" else None,
            booster=None if booster is None else tapped(booster, device, config.runtime.channels_last),
            labels=config.data.labels,
            class_weights=None if setup.class_weights is None else torch.tensor(setup.class_weights, device=device),
            embedding_widths=setup.embedding_widths,
            classifier=setup.student.num_classes > 0,
            labelled_share=setup.splits.labelled_share,
            weight=config.teacher.weight,
            others=[Counterpart(it.plan, it.embedding_widths, it.weight) for it in setup.teachers[1:]],
        )
    for note in loss.notes:
        report.warn(note)
    if config.runtime.compile and world.size == 1:
        loss.compile()
    return loss


def _held_out(
    setup: Setup,
    teacher: Teachers | None,
    device: torch.device,
    unreadable: UnreadableImages,
    precision: AbstractContextManager[Any],
    world: World,
    shared: SharedParts | None,
) -> HeldOutGraph | None:
    if setup.student.num_classes:
        return None
    splits, data, live = setup.splits, setup.config.data, None if teacher is None else teacher.network

    def load() -> Loader:
        return eval_loader(splits, data, setup.crop, device, unreadable, HELD_OUT_IMAGES, world)

    loader = load() if shared is None else shared.validation_loader("held out", data.image_cache_gib, load)
    return HeldOutGraph(loader, precision, world, live, splits.labelled)


def _build_data(
    setup: Setup,
    teachers: Teachers | None,
    device: torch.device,
    world: World,
    report: Report,
    shared: SharedParts | None,
) -> dict[str, Any]:
    config, splits = setup.config, setup.splits
    unreadable = UnreadableImages(config.data.max_bad_images, report.warn, report.line)
    if shared is not None:
        unreadable = shared.unreadable = shared.unreadable or unreadable
    rows = None if teachers is None else teachers.cached_rows()
    crop = setup.student.input if splits.labelled and setup.student.num_classes else setup.crop

    def load_train() -> Loader:
        return train_loader(
            splits, config.data, config.augment, setup.crop, device, config.seed, unreadable, world, rows
        )

    def load_validation() -> Loader:
        return eval_loader(splits, config.data, crop, device, unreadable, world=world)

    train: Loader | TurnLoader
    validation: Loader | KeptLoader
    if shared is None:
        train, validation = load_train(), load_validation()
    else:
        train = shared.train_loader(load_train)
        validation = shared.validation_loader("validation", config.data.image_cache_gib, load_validation)
    accumulate = config.optim.accumulate
    if len(train) < accumulate:
        raise UserError(f"--accumulate {accumulate}: an epoch has {len(train)} batches, at most that many accumulate")
    return {
        "train": train,
        "validation": validation,
        "unreadable": unreadable,
        "mixup": build_mixup(config.augment, config.data.batch_size, max(len(setup.classes), 1)),
        "batches": len(train) // accumulate * accumulate,
        "data_facts": {
            "training images": train.images,
            "validation images": int(world.sum(torch.tensor(validation.images))),
            "classes": setup.classes,
        },
    }
