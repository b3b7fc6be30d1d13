"""What a run is made of, on this process's device: loss, networks, loaders, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from timm.utils import ModelEmaV3
from torch import nn

from irgdistill.data import UnreadableImages, eval_loader, train_loader
from irgdistill.errors import UserError
from irgdistill.io import Report
from irgdistill.losses import Learner, build_loss
from irgdistill.matching import Tapped, has_unused_parameters
from irgdistill.models import fold_batch_norm
from irgdistill.runtime import World, autocast, choose_device, keep_memory, sync_batch_norm
from irgdistill.training.evaluation import evaluate
from irgdistill.training.optimization import build_mix, build_optimizer, build_scheduler
from irgdistill.training.setup import Setup

What = TypeVar("What", bound=Callable[..., Any])


CHECK_IMAGES = 2000
"""Validation images on which the teacher is tried before training."""


class Parts:
    """Built from a `Setup`; see `Trainer`, which runs them."""

    def __init__(self, setup: Setup, report: Report, world: World) -> None:
        config = setup.config
        self.setup, self.config, self.report = setup, config, report
        self.world = world
        self.device = choose_device(config.runtime.device, self.world.local_rank)
        keep_memory(self.device)
        self.autocast = autocast(config.runtime.amp, self.device)
        self.loss = build_loss(
            config.losses,
            setup.plan,
            self.world if config.runtime.graph_scope == "global" else None,
            self._booster(),
            config.data.labels,
            None if setup.class_weights is None else torch.tensor(setup.class_weights, device=self.device),
        )
        for note in self.loss.notes:
            report.warn(note)
        if config.runtime.compile and self.world.size == 1:
            self._prepare_compiler()
            self.loss.compile()
        self._build_networks()
        self._build_loaders()
        self._build_optimizer()

    # --- building -----------------------------------------------------------------------------------------------------

    def _build_networks(self) -> None:
        setup, config = self.setup, self.config
        last = config.runtime.channels_last
        model = self._place(setup.student.model)
        self.ema = None if config.optim.ema is None else ModelEmaV3(model, decay=config.optim.ema, use_warmup=True)
        if config.runtime.sync_bn:
            model = sync_batch_norm(model, self.world)
        view = setup.student.view().to(self.device)
        self.tapped = Tapped(model, view, channels_last=last, **self.loss.where("student"))
        network = self._compiled(self.tapped, config.runtime.compile_mode)
        self.adapters = self.loss.adapters().to(self.device)
        if config.runtime.sync_bn and list(self.adapters.parameters()):
            sync_batch_norm(self.adapters, self.world)
        learner = Learner(network, self.adapters) if len(self.adapters) else network
        unused = self.world.size > 1 and (
            not self.loss.trains_classifier or has_unused_parameters(self.tapped, setup.student.input.shape)
        )
        self.student = self.world.wrap(learner, unused)
        self.deployed = network if self.ema is None else Tapped(self.ema.module, view, (), last)
        self.teacher = None
        if setup.teacher is not None and setup.cache is None:
            model, view = self._place(setup.teacher.model), setup.teacher.view().to(self.device)
            where = self.loss.where("teacher")
            if config.runtime.fold_batch_norm:
                fold_batch_norm(
                    model.eval(), setup.teacher.input.size, {tap.module for taps in where.values() for tap in taps}
                )
            teacher = Tapped(model, view, channels_last=last, **where)
            self.teacher = self._compiled(teacher.requires_grad_(False).eval(), config.runtime.compile_mode)

    def _booster(self) -> Tapped | None:
        booster = self.setup.booster
        if booster is None:
            return None
        view = booster.view().to(self.device)
        return Tapped(self._place(booster.model), view, (), self.config.runtime.channels_last)

    def _place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.config.runtime.channels_last else model

    def _compiled(self, what: What, mode: str | None = None) -> What:
        if not self.config.runtime.compile:
            return what
        self._prepare_compiler()
        return cast(What, torch.compile(what, mode=mode))

    def _prepare_compiler(self) -> None:
        torch._functorch.config.donated_buffer = False  # gradient shares run backward more than once
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # networks alike may differ in their taps
        torch._dynamo.reset()  # or earlier runs of this process would use up the limit of recompilations

    def _build_loaders(self) -> None:
        setup, config, student = self.setup, self.config, self.setup.student
        self.bad = UnreadableImages(config.data.max_bad_images, self.report.warn)
        self.cache = setup.cache if config.uses_teacher else None
        if self.cache is not None:
            self.cache.open(self.loss.where("teacher"))
        self.train = train_loader(
            setup.splits,
            config.data,
            config.augment,
            setup.crop,
            self.device,
            config.seed,
            self.bad,
            self.world,
            None if self.cache is None else self.cache.answers,
        )
        self.val = eval_loader(
            setup.splits,
            config.data,
            student.input if setup.splits.labelled else setup.crop,
            self.device,
            self.bad,
            world=self.world,
        )
        self.data = {
            "training images": self.train.images,
            "validation images": int(self.world.sum(torch.tensor(self.val.images))),
            "classes": setup.classes,
        }
        self.accumulate = config.optim.accumulate
        self.batches = len(self.train) // self.accumulate * self.accumulate
        if not self.batches:
            raise UserError(
                f"--accumulate {self.accumulate}: an epoch has {len(self.train)} batches, at most that many accumulate"
            )
        self.updates = config.schedule.epochs * (self.batches // self.accumulate)
        self.mix = build_mix(config.augment, config.data.batch_size, len(setup.classes))

    def _build_optimizer(self) -> None:
        config = self.config
        self.optimizer = build_optimizer(self.tapped.model, config.optim, self.adapters)
        self.scheduler = build_scheduler(self.optimizer, config.schedule, self.batches // self.accumulate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.runtime.amp == "fp16")

    def _check_teacher(self) -> dict[str, Any] | None:
        """Evaluate the teacher with its own preprocessing -> what to record. Raises UserError near chance."""
        teacher, setup = self.setup.teacher, self.setup
        assert teacher is not None and self.teacher is not None
        if not setup.splits.labelled:
            self.report.warn("the validation images have no labels: the teacher's accuracy is not checked")
            return None
        if teacher.num_classes != len(setup.classes):
            self.report.warn(
                f"the teacher has {teacher.num_classes} classes, the data {len(setup.classes)}: accuracy not checked"
            )
            return None
        loader = eval_loader(
            setup.splits, self.config.data, teacher.input, self.device, self.bad, limit=CHECK_IMAGES, world=self.world
        )
        tried = evaluate(self.teacher, loader, self.autocast, world=self.world)
        top1, chance = tried.top1 or 0.0, 100 / len(setup.classes)
        self.report.line(f"teacher {teacher.name}: top-1 {top1:.2f} on {tried.images} validation images")
        if top1 < chance + 0.1 * (100 - chance):
            raise UserError(
                f"the teacher reaches top-1 {top1:.1f} on this data, chance is {chance:.1f}: its classes may be in "
                "another order, its mean/std or weights wrong; --skip-teacher-check trains all the same"
            )
        return {"kind": "teacher", "top1": top1, "images": tried.images}
