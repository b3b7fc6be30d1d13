"""The training loop: one step, the epochs around it, saving and going on."""

from __future__ import annotations

import json
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, cast

import timm
import torch
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn

from irgdistill import __version__
from irgdistill.checkpoint import (
    RunFolder,
    describe,
    load_state,
    random_states,
    restore_random_states,
    save_state,
    save_tensors,
    timm_config,
    write_text,
)
from irgdistill.config import dump
from irgdistill.data import BadImages, eval_loader, train_loader
from irgdistill.errors import Interrupted, UserError
from irgdistill.evaluate import Metrics, evaluate
from irgdistill.losses import Batch, build_loss, gradient_shares
from irgdistill.optim import build_mix, build_optimizer, build_scheduler
from irgdistill.report import Report
from irgdistill.setup import Setup, autocast, choose_device
from irgdistill.taps import Tapped

CHECK_IMAGES = 2000
"""Validation images on which the teacher is tried before training."""


class Trainer:
    """One run: `Trainer(prepare(config), RunFolder(path), Report(…)).fit()`."""

    def __init__(self, setup: Setup, folder: RunFolder, report: Report) -> None:
        config = setup.config
        self.setup, self.config, self.folder, self.report = setup, config, folder, report
        self.device = choose_device(config.runtime.device)
        self.autocast = autocast(config.runtime.amp, self.device)
        self.loss = build_loss(config.losses, setup.plan)
        if config.losses.weights()["transform"] > 0 and "transform" not in self.loss.terms:
            report.warn("no transformation term: no matched stage has two taps of equal width in both networks")
        self._build_networks()
        self._build_loaders()
        self._build_optimizer()
        self.epoch = self.batch = self.update = 0
        """Epochs done, batches of the next one done, updates done."""
        self.sums: dict[str, Tensor] = {}
        self.best: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.seconds, self.images_seen = 0.0, 0
        self.signal: int | None = None

    # --- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Raw images (B, 3, H, W), labels (B,) -> total and raw terms. One backward; an update at a boundary."""
        images, targets = (images, labels) if self.mix is None else self.mix(images.float(), labels)
        with self.autocast:
            with torch.no_grad():
                teacher = None if self.teacher is None else self.teacher(images)
            student = self.student(images)
        raw = self.loss(Batch(student, targets, teacher))
        total = self.loss.total(raw)
        self._refuse_non_finite(total, raw)
        self._sample_shares(raw)
        self.scaler.scale(total / self.accumulate).backward()
        self.batch += 1
        if self.batch % self.accumulate == 0:
            self._update_weights()
        return {"loss": total.detach(), **{name: value.detach() for name, value in raw.items()}}

    def _update_weights(self) -> None:
        if self.config.optim.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.tapped.parameters(), self.config.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.update += 1
        self.scheduler.step_update(self.update)
        if self.ema is not None:
            self.ema.update(self.tapped.model, step=self.update)

    def _refuse_non_finite(self, total: Tensor, raw: dict[str, Tensor]) -> None:
        if not total.isfinite():
            guilty = ", ".join(f"{name} = {value.item()}" for name, value in raw.items() if not value.isfinite())
            raise UserError(
                f"the loss is not finite at update {self.update + 1}, epoch {self.epoch + 1} ({guilty or 'total'}); "
                "the weights were not changed; a lower --lr, --clip-grad 1 or --amp none may help"
            )

    def _sample_shares(self, raw: dict[str, Tensor]) -> None:
        every = self.config.runtime.share_every
        if every and len(raw) > 1 and self.update % every == 0 and self.batch % self.accumulate == 0:
            shares = gradient_shares(raw, self.loss.weights, list(self.tapped.parameters()))
            self.report.record({"kind": "gradient", "epoch": self.epoch + 1, "update": self.update, "share": shares})

    # --- the run ------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch -> the run's summary. Raises UserError, or Interrupted once everything is saved."""
        epochs = self.config.schedule.epochs
        with self._listening(), self.report.progress(epochs * self.batches, self._done()):
            while self.epoch < epochs:
                self._train_epoch()
                self._end_epoch(evaluate(self.deployed, self.val, self.autocast))
                if self.epoch < epochs:
                    self._stop_if_asked()
        return self._finish()

    def start(self) -> None:
        """Write what defines the run, try the teacher, save the first state."""
        write_text(self.folder.config, dump(self.config))
        config = timm_config(self.setup.student, self.setup.classes)
        write_text(self.folder.timm_config, json.dumps(config, indent=2) + "\n")
        if self.teacher is not None and self.config.teacher.check:
            self._check_teacher()
        random_seed(self.config.seed)
        self._save_state()

    def resume(self) -> None:
        """Go on from the state in the run folder."""
        state = load_state(self.folder.state)
        self.tapped.model.load_state_dict(state["student"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.update = state["epoch"], state["batch"], state["update"]
        self.scheduler.step_update(self.update)
        self.best, self.last, self.sums = state["best"], state["last"], state["sums"]
        self.seconds, self.images_seen = state["seconds"], state["images_seen"]
        restore_random_states(state["random"])
        self.report.rewind(state["metrics_bytes"])

    def _train_epoch(self) -> None:
        self.student.train()
        log_every = self.config.runtime.log_every * self.accumulate
        since, images_since = time.perf_counter(), 0
        for images, labels in self.train.epoch(self.epoch, start=self.batch):
            values = {"count": torch.ones((), device=self.device), **self.train_step(images, labels)}
            self.sums = {name: self.sums[name] + value for name, value in values.items()} if self.sums else values
            images_since += len(labels)
            if self.batch % log_every == 0 or self.batch == self.batches:
                self._log(images_since, time.perf_counter() - since)
                since, images_since = time.perf_counter(), 0
            if self.batch == self.batches:
                return
            if self.batch % self.accumulate == 0:
                self._stop_if_asked()

    def _log(self, images: int, seconds: float) -> None:
        self.seconds, self.images_seen = self.seconds + seconds, self.images_seen + images
        count, *sums = torch.stack([value.float() for value in self.sums.values()]).tolist()
        means = dict(zip(list(self.sums)[1:], (value / count for value in sums), strict=True))
        self.sums = {}
        terms = {name: value for name, value in means.items() if name != "loss"}
        self.report.record(
            {
                "kind": "train",
                "epoch": self.epoch + 1,
                "update": self.update,
                "lr": self.optimizer.param_groups[0]["lr"],
                "loss": means["loss"],
                "terms": terms,
                "images_per_second": images / seconds,
            }
        )
        title = f"epoch {self.epoch + 1}/{self.config.schedule.epochs}"
        if self.best:
            title += f"  top-1 {self.last['top1']:.2f} (best {self.best['top1']:.2f})"
        self.report.advance(self._done(), title, means, images / seconds)

    def _end_epoch(self, metrics: Metrics) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self.last = {"epoch": self.epoch, **{k: v for k, v in asdict(metrics).items() if v is not None}}
        self.report.record({"kind": "eval", **self.last})
        better = not self.best or metrics.top1 > self.best["top1"]
        if better:
            self.best = self.last
            self._save_weights("best")
        self._save_weights("last")
        self._save_state()
        self.report.line(
            f"epoch {self.epoch}/{self.config.schedule.epochs}  top-1 {metrics.top1:.2f}  top-5 {metrics.top5:.2f}  "
            f"val loss {metrics.loss:.3f}{'  (best)' if better else ''}"
        )

    def _finish(self) -> dict[str, Any]:
        teacher = self.setup.teacher
        summary = {
            "method": self.config.method,
            "student": self.setup.student.name,
            "teacher": None if teacher is None else teacher.name,
            **{key: self.best[key] for key in ("top1", "top5", "epoch")},
            "last_top1": self.last["top1"],
            "epochs": self.config.schedule.epochs,
            "seconds": self.seconds,
            "images_per_second": self.images_seen / max(self.seconds, 1e-9),
            "seed": self.config.seed,
            "bad_images": self.bad.names,
        }
        write_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        return summary

    # --- stopping -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks for a stop at the next update, a second one stops at once."""

        def note(number: int, _frame: Any) -> None:
            self.signal = number
            for each, handler in before.items():
                signal.signal(each, handler)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _stop_if_asked(self) -> None:
        if self.signal is not None:
            self._save_weights("last")
            self._save_state()
            where = f"epoch {self.epoch + 1}, batch {self.batch} of {self.batches}"
            raise Interrupted(
                128 + self.signal,
                f"stopped at {where}, all saved; go on with: irgdistill distill --resume {self.folder.path}",
            )

    # --- saving -------------------------------------------------------------------------------------------------------

    def _save_weights(self, which: str) -> None:
        setup, teacher = self.setup, self.setup.teacher
        metadata = {
            **describe(setup.student, setup.classes),
            "metrics": self.best if which == "best" else self.last,
            "method": self.config.method,
            "losses": self.config.losses.model_dump(mode="json"),
            "seed": self.config.seed,
            "teacher": None if teacher is None else {"architecture": teacher.architecture, "name": teacher.name},
            "plan": None if setup.plan is None else setup.plan.to_dict(),
            "data": self.config.data.model_dump(mode="json"),
            "versions": {
                "irgdistill": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
        }
        save_tensors(getattr(self.folder, which), self.deployed.model.state_dict(), metadata)

    def _save_state(self) -> None:
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "update": self.update,
            "student": self.tapped.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states(),
            "best": self.best,
            "last": self.last,
            "sums": self.sums,
            "seconds": self.seconds,
            "images_seen": self.images_seen,
            "metrics_bytes": self.report.offset(),
        }
        save_state(self.folder.state, state)

    def _done(self) -> int:
        return self.epoch * self.batches + self.batch

    # --- building -----------------------------------------------------------------------------------------------------

    def _build_networks(self) -> None:
        setup, config = self.setup, self.config
        tail = config.losses.edges.blocks if config.losses.weights()["edges"] > 0 else 1
        plan, last = setup.plan, config.runtime.channels_last
        model = self._place(setup.student.model)
        self.ema = None if config.optim.ema is None else ModelEmaV3(model, decay=config.optim.ema, use_warmup=True)
        view = setup.student.view().to(self.device)
        self.tapped = Tapped(model, view, plan.student_taps(tail) if plan else (), last)
        self.student = self._compiled(self.tapped)
        self.deployed = self.student if self.ema is None else Tapped(self.ema.module, view, (), last)
        self.teacher = None
        if setup.teacher is not None:
            model, view = self._place(setup.teacher.model), setup.teacher.view().to(self.device)
            teacher = Tapped(model, view, plan.teacher_taps() if plan else (), last)
            self.teacher = self._compiled(teacher.requires_grad_(False).eval())

    def _place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.config.runtime.channels_last else model

    def _compiled(self, network: Tapped) -> Tapped:
        if not self.config.runtime.compile:
            return network
        torch._functorch.config.donated_buffer = False  # gradient shares run backward more than once
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # networks alike may differ in their taps
        torch._dynamo.reset()  # or earlier runs of this process would use up the limit of recompilations
        return cast(Tapped, torch.compile(network))

    def _build_loaders(self) -> None:
        setup, config, student = self.setup, self.config, self.setup.student
        self.bad = BadImages(config.data.max_bad_images, self.report.warn)
        self.train = train_loader(
            setup.splits,
            config.data,
            config.augment,
            setup.size,
            student.interpolation,
            student.mean,
            self.device,
            config.seed,
            self.bad,
        )
        self.val = eval_loader(
            setup.splits, config.data, student.size, student.interpolation, student.crop_pct, self.device, self.bad
        )
        self.accumulate = config.optim.accumulate
        self.batches = len(self.train) // self.accumulate * self.accumulate
        if not self.batches:
            raise UserError(
                f"--accumulate {self.accumulate}: an epoch has {len(self.train)} batches, at most that many accumulate"
            )
        self.mix = build_mix(config.augment, config.data.batch_size, len(setup.classes))

    def _build_optimizer(self) -> None:
        config = self.config
        self.optimizer = build_optimizer(self.tapped.model, config.optim)
        self.scheduler = build_scheduler(self.optimizer, config.schedule, self.batches // self.accumulate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.runtime.amp == "fp16")

    def _check_teacher(self) -> None:
        """Evaluate the teacher with its own preprocessing. Raises UserError near chance."""
        teacher, setup = self.setup.teacher, self.setup
        assert teacher is not None and self.teacher is not None
        if teacher.num_classes != len(setup.classes):
            self.report.warn(
                f"the teacher has {teacher.num_classes} classes, the data {len(setup.classes)}: accuracy not checked"
            )
            return
        loader = eval_loader(
            setup.splits,
            self.config.data,
            teacher.size,
            teacher.interpolation,
            teacher.crop_pct,
            self.device,
            self.bad,
            limit=CHECK_IMAGES,
        )
        top1 = evaluate(self.teacher, loader, self.autocast).top1
        chance = 100 / len(setup.classes)
        self.report.line(f"teacher {teacher.name}: top-1 {top1:.2f} on {loader.images} validation images")
        if top1 < chance + 0.1 * (100 - chance):
            raise UserError(
                f"the teacher reaches top-1 {top1:.1f} on this data, chance is {chance:.1f}: its classes may be in "
                "another order, its mean/std or weights wrong; --skip-teacher-check trains all the same"
            )
