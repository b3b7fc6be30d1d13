"""The Python interface: a run in one call, or the loss for your own training loop.

    from irgdistill import Distiller
    distiller = Distiller(teacher, student)  # two timm models
    for images, labels in loader:
        loss, terms = distiller(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

Shapes: B images, K classes, D the width of a tap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irgdistill.commands.distill import start
from irgdistill.commands.requests import DistillRequest
from irgdistill.config import (
    AUTO,
    DEFAULT_METHOD,
    ENCODER_METHOD,
    STAGE_KINDS,
    Config,
    Pooling,
    load_config,
    values_of,
)
from irgdistill.errors import UserError
from irgdistill.losses import Batch, Learner, build_loss
from irgdistill.matching import Output, Plan, Tap, Tapped
from irgdistill.matching import match as match_levels
from irgdistill.models import Network
from irgdistill.training import check_classes, difference


def distill(
    config: Config | None = None, output: str | Path | None = None, overwrite: bool = False, **options: Any
) -> dict[str, Any]:
    """Train a student as `irgdistill distill` does, in this process -> the run's summary and its `folder`.

    `config` as `load_config` returns it; or the command's own `options`, such as `student="resnet18"`,
    `data="./imagenet"`, `epochs=10`, `no_labels=True`, `preset="quickstart"`, `settings=["data.train_images=1000"]`.
    Raises UserError for bad input, if possible before anything is trained; `errors.Interrupted` after a signal, once
    everything is saved.
    """
    if config is None:
        config = _config_of(options)
    elif options:
        raise UserError(f"distill takes a configuration or options, not both: leave out {', '.join(sorted(options))}")
    summary = start(DistillRequest(config, None if output is None else Path(output), overwrite))
    assert summary is not None, "no workers were asked for"
    return summary


def _config_of(options: Mapping[str, Any]) -> Config:
    given = dict(options)
    preset, settings = given.pop("preset", None), given.pop("settings", None)
    return load_config(preset, settings, values_of(given))


def match(teacher: nn.Module, student: nn.Module, **overrides: Any) -> Plan:
    """Match the stages of two timm models. `overrides`: keys of the section `matching` (levels, skip, taps_…).

    Uses shapes alone; the models may be on any device and do not change. Raises UserError: not a timm model, no stage
    that can be tapped, an override that names an unknown block or resolution.
    """
    config = load_config(flags={f"matching.{name}": value for name, value in overrides.items()}).matching
    return match_levels(_network(teacher, "teacher").levels(), _network(student, "student").levels(), config)


class Distiller(nn.Module):
    """Teacher, student and the loss between them, for your own training loop.

    `parameters()`, `state_dict()` and `train()` cover the student and the `adapters` that some methods train beside it
    (the convolutions of `fitnet` and `fsp`). The teacher is frozen, runs in eval mode, and moves along with `to()`.
    Hooks are on the networks during a call only. Relations span the images of one call, under DDP those of each
    process; a single image has none.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        method: str = AUTO,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`teacher`, `student`: timm models; `teacher` None for the method `none`.

        `settings`: keys of the configuration that define the loss, such as `{"losses.kd.temperature": 2,
        "matching.skip": [4]}`. Raises UserError: unknown method or key, not a timm model, networks that do not match,
        different classes if a term compares logits.
        """
        super().__init__()
        for key in settings or {}:
            if not key.startswith(("losses.", "matching.")):
                raise UserError(f"{key!r} does not define the loss: settings take keys of losses and matching")
        self.config = load_config(flags={**(settings or {}), "method": method})
        self.plan: Plan | None = None
        """The matched stages; None if no term compares stages."""
        for name in self.config.losses.comparing("booster"):
            raise UserError(
                f"{name} trains a second network from scratch: irgdistill distill --method {name} builds it"
            )
        self._widths: tuple[int, int] | None = None
        if self.config.uses_teacher:
            if teacher is None:
                raise UserError(f"method {method!r} needs a teacher")
            own, other = _network(student, "student"), _network(teacher, "teacher")
            classes = [str(i) for i in range(own.num_classes)]
            self.config = self.config.with_method(ENCODER_METHOD if difference(other, classes) else DEFAULT_METHOD)
            check_classes(self.config, [other], classes)
            if self.config.losses.comparing("embedding"):
                self._widths = own.embedding_width(), other.embedding_width()
            if self.config.losses.comparing(*STAGE_KINDS):
                self.plan = match(teacher, student, **self.config.matching.model_dump())
        self.student = student
        self.loss = build_loss(self.config.losses, self.plan, embedding_widths=self._widths)
        self.adapters = self.loss.adapters().to(next(student.parameters()).device)
        # In a tuple, so that the teacher's weights are not among this module's parameters.
        self._teacher = (teacher.requires_grad_(False),) if teacher is not None and self.config.uses_teacher else ()

    def forward(
        self, images: Tensor, labels: Tensor, teacher_images: Tensor | None = None, progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images (B, 3, H, W), normalised; labels (B,) class indices or (B, K) probabilities -> loss, terms.

        The loss is a scalar, Σ weight · term; the terms are the raw means by name, detached. `teacher_images`
        (B, 3, H', W'): the same crops at the teacher's size and normalisation, if these differ. `progress`: share of
        the training that is done, 0 to 1, by which hints fade out. With terms on two views of each image, a batch holds
        all first views and then all second ones, in the same order.
        """
        embedding: Pooling | None = None if self._widths is None else "auto"
        student = _look(self.student, images, self.loss.where("student"), embedding, self.adapters)
        teacher = None
        for model in self._teacher:
            with torch.no_grad():
                seen = images if teacher_images is None else teacher_images
                teacher = _look(model.eval(), seen, self.loss.where("teacher"), embedding)
        with torch.autocast(images.device.type, enabled=False):
            total, raw, _ = self.loss.losses(Batch(student, labels, teacher), progress)
            return total, {name: value.detach() for name, value in raw.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        for teacher in self._teacher:
            teacher._apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _look(
    model: nn.Module,
    images: Tensor,
    where: Mapping[str, Sequence[Tap]],
    embedding: Pooling | None,
    adapters: nn.ModuleDict | None = None,
) -> Output:
    """One forward pass with taps, which are removed after it."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    tapped = Tapped(model, None, channels_last=last, embedding=embedding, **where)
    try:
        output: Output = Learner(tapped, adapters)(images) if adapters else tapped(images)
        return output
    finally:
        tapped.release()


def _network(model: nn.Module, role: str) -> Network:
    """Wrap a timm model. Raises UserError for any other module."""
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        raise UserError(f"the {role}, {type(model).__name__}, is not a timm model: make it with timm.create_model")
    return Network.of(model)
