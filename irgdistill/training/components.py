"""Builds what a run is made of on this process's device: loss, networks, loaders, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from irgdistill.config import Config, Pooling
from irgdistill.data import Loader, UnreadableImages, eval_loader, train_loader
from irgdistill.errors import UserError
from irgdistill.io import Report
from irgdistill.losses import Counterpart, DistillLoss, Learner, build_loss
from irgdistill.matching import Tapped, has_unused_parameters
from irgdistill.models import Network, fold_batch_norm
from irgdistill.runtime import (
    World,
    autocast,
    choose_device,
    gpu_settings,
    renew_statistics,
    slow_precision,
    sync_batch_norm,
)
from irgdistill.training.held_out import HELD_OUT_IMAGES, HeldOutGraph
from irgdistill.training.optimization import build_mixup, build_optimizer, build_scheduler
from irgdistill.training.precision import precision_of
from irgdistill.training.setup import Setup
from irgdistill.training.state import SavedState
from irgdistill.training.teachers import CachedRows, CachedTeacher, LiveTeacher, Teacher, Teachers

Compilable = TypeVar("Compilable", bound=Callable[..., Any])


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
    train: Loader
    validation: Loader
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


def build_components(setup: Setup, world: World, report: Report) -> RunComponents:
    """Build a run on the device of this process. Raises UserError for settings that cannot work."""
    device = choose_device(setup.config.runtime.device, world.local_rank)
    with gpu_settings(device, setup.config.runtime.deterministic):
        return _build_components(setup, device, world, report)


def _build_components(setup: Setup, device: torch.device, world: World, report: Report) -> RunComponents:
    setup = replace(setup, config=_with_precision(setup, device, world, report))
    config = setup.config
    loss = _build_loss(setup, device, world, report)
    networks = _build_networks(setup, loss, device, world)
    data = _build_data(setup, loss, device, world, report)
    renew_statistics(networks["student"].model, data["batches"])
    precision = autocast(config.runtime.amp, device)
    optimizer = build_optimizer(networks["student"].model, config.optim, networks["adapters"])
    updates_per_epoch = data["batches"] // config.optim.accumulate
    return RunComponents(
        setup=setup,
        world=world,
        device=device,
        autocast=precision,
        held_out=_held_out(setup, networks["teacher"], device, data["unreadable"], precision, world),
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
            booster=None if booster is None else _tapped(booster, device, config.runtime.channels_last),
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


def _build_networks(setup: Setup, loss: DistillLoss, device: torch.device, world: World) -> dict[str, Any]:
    runtime, optim = setup.config.runtime, setup.config.optim
    last = runtime.channels_last
    model = _on_device(setup.student.model, device, last)
    ema = None if optim.ema is None else ModelEmaV3(model, decay=optim.ema, use_warmup=True)
    if runtime.sync_bn:
        model = sync_batch_norm(model, world)
    view = setup.student.preprocess().to(device)
    embedding: Pooling | None = "auto" if _embeds(setup, loss) else None
    student = Tapped(model, view, channels_last=last, **loss.where("student"), embedding=embedding)
    compiled = _compiled(student, setup.config)
    adapters = loss.adapters().to(device)
    if runtime.sync_bn and list(adapters.parameters()):
        sync_batch_norm(adapters, world)
    learner = Learner(compiled, adapters) if len(adapters) else compiled
    unused = world.size > 1 and (
        not loss.trains_classifier or has_unused_parameters(student, setup.student.input.shape)
    )
    return {
        "student": student,
        "adapters": adapters,
        "trained": world.wrap(learner, unused),
        "evaluated": compiled if ema is None else Tapped(ema.module, view, (), last, embedding=embedding),
        "ema": ema,
        "teacher": _build_teachers(setup, loss, device),
    }


def _build_teachers(setup: Setup, loss: DistillLoss, device: torch.device) -> Teachers | None:
    members = [_build_teacher(setup, loss, device, number) for number in range(len(setup.teachers))]
    if not members:
        return None
    return Teachers(members, [it.weight for it in setup.teachers], [it.answers for it in setup.teachers])


def _build_teacher(setup: Setup, loss: DistillLoss, device: torch.device, number: int) -> Teacher:
    runtime, taps, teacher = setup.config.runtime, loss.where("teacher", number), setup.teachers[number]
    if teacher.cache is not None:
        teacher.cache.open(taps)
        return CachedTeacher(teacher.cache)
    model = _on_device(teacher.network.model, device, runtime.channels_last)
    view = teacher.network.preprocess().to(device)
    if runtime.fold_batch_norm:
        tapped_modules = {tap.module for kind in taps.values() for tap in kind}
        fold_batch_norm(model.eval(), teacher.network.input.size, tapped_modules)
    embedding = teacher.network.pooling if _embeds(setup, loss) else None
    network = Tapped(model, view, channels_last=runtime.channels_last, **taps, embedding=embedding)
    return LiveTeacher(_compiled(network.requires_grad_(False).eval(), setup.config))


def _embeds(setup: Setup, loss: DistillLoss) -> bool:
    """Whether the run reads embeddings: for a term, or to evaluate a student without a classifier."""
    return loss.compares_embeddings or not setup.student.num_classes


def _held_out(
    setup: Setup,
    teacher: Teachers | None,
    device: torch.device,
    unreadable: UnreadableImages,
    precision: AbstractContextManager[Any],
    world: World,
) -> HeldOutGraph | None:
    if setup.student.num_classes:
        return None
    splits, live = setup.splits, None if teacher is None else teacher.network
    loader = eval_loader(splits, setup.config.data, setup.crop, device, unreadable, HELD_OUT_IMAGES, world)
    return HeldOutGraph(loader, precision, world, live, splits.labelled)


def _build_data(setup: Setup, loss: DistillLoss, device: torch.device, world: World, report: Report) -> dict[str, Any]:
    config = setup.config
    unreadable = UnreadableImages(config.data.max_bad_images, report.warn, report.line)
    caches = [teacher.cache for teacher in setup.teachers if teacher.cache is not None]
    train = train_loader(
        setup.splits,
        config.data,
        config.augment,
        setup.crop,
        device,
        config.seed,
        unreadable,
        world,
        CachedRows(caches) if caches else None,
    )
    crop = setup.student.input if setup.splits.labelled and setup.student.num_classes else setup.crop
    validation = eval_loader(setup.splits, config.data, crop, device, unreadable, world=world)
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


def _tapped(network: Network, device: torch.device, channels_last: bool) -> Tapped:
    view = network.preprocess().to(device)
    return Tapped(_on_device(network.model, device, channels_last), view, (), channels_last)


def _on_device(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _compiled(network: Compilable, config: Config) -> Compilable:
    if not config.runtime.compile:
        return network
    return cast(Compilable, torch.compile(network, mode=config.runtime.compile_mode))
