"""Builds the networks of a run on a device: student, adapters and teachers, with their taps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from timm.utils import ModelEmaV3
from torch import nn

from irgdistill.config import Config, Pooling
from irgdistill.losses import DistillLoss, Learner
from irgdistill.matching import Tap, Tapped, has_unused_parameters
from irgdistill.models import Network, fold_batch_norm
from irgdistill.runtime import World, sync_batch_norm
from irgdistill.training.setup import Setup
from irgdistill.training.shared import SharedParts
from irgdistill.training.teachers import CachedTeacher, LiveTeacher, Teacher, Teachers

Compilable = TypeVar("Compilable", bound=Callable[..., Any])


def build_networks(
    setup: Setup, loss: DistillLoss, device: torch.device, world: World, shared: SharedParts | None
) -> dict[str, Any]:
    runtime, optim = setup.config.runtime, setup.config.optim
    last = runtime.channels_last
    model = _on_device(setup.student.model, device, last)
    ema = None if optim.ema is None else ModelEmaV3(model, decay=optim.ema, use_warmup=True)
    if runtime.sync_bn:
        model = sync_batch_norm(model, world)
    view: nn.Module = setup.student.preprocess().to(device)
    if shared is not None and not runtime.compile:
        view = shared.student_view(view)
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
        "teacher": _build_teachers(setup, loss, device, shared),
    }


def _build_teachers(
    setup: Setup, loss: DistillLoss, device: torch.device, shared: SharedParts | None
) -> Teachers | None:
    members = [_build_teacher(setup, loss, device, number, shared) for number in range(len(setup.teachers))]
    if not members:
        return None
    return Teachers(members, [it.weight for it in setup.teachers], [it.answers for it in setup.teachers])


def _build_teacher(
    setup: Setup, loss: DistillLoss, device: torch.device, number: int, shared: SharedParts | None
) -> Teacher:
    taps, teacher = loss.where("teacher", number), setup.teachers[number]
    if teacher.cache is not None:
        if shared is not None:
            return CachedTeacher(shared.cache(teacher.cache, taps))
        teacher.cache.open(taps)
        return CachedTeacher(teacher.cache)
    embedding = teacher.network.pooling if _embeds(setup, loss) else None
    if shared is None:
        return LiveTeacher(_live_network(setup, taps, device, number, embedding))
    remembers = not setup.config.runtime.compile  # CUDA graphs overwrite the answer in the next run's step

    def make() -> LiveTeacher:
        return LiveTeacher(_live_network(setup, taps, device, number, embedding), remembers)

    return shared.teacher(number, taps, embedding, make)


def _live_network(
    setup: Setup, taps: dict[str, list[Tap]], device: torch.device, number: int, embedding: Pooling | None
) -> Tapped:
    """The frozen network of a teacher, with its taps."""
    runtime, teacher = setup.config.runtime, setup.teachers[number]
    model = _on_device(teacher.network.model, device, runtime.channels_last)
    view = teacher.network.preprocess().to(device)
    if runtime.fold_batch_norm:
        tapped_modules = {tap.module for kind in taps.values() for tap in kind}
        fold_batch_norm(model.eval(), teacher.network.input.size, tapped_modules)
    network = Tapped(model, view, channels_last=runtime.channels_last, **taps, embedding=embedding)
    return _compiled(network.requires_grad_(False).eval(), setup.config)


def _embeds(setup: Setup, loss: DistillLoss) -> bool:
    """Whether the run reads embeddings: for a term, or to evaluate a student without a classifier."""
    return loss.compares_embeddings or not setup.student.num_classes


def tapped(network: Network, device: torch.device, channels_last: bool) -> Tapped:
    view = network.preprocess().to(device)
    return Tapped(_on_device(network.model, device, channels_last), view, (), channels_last)


def _on_device(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _compiled(network: Compilable, config: Config) -> Compilable:
    if not config.runtime.compile:
        return network
    return cast(Compilable, torch.compile(network, mode=config.runtime.compile_mode))
