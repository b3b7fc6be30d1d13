"""The Python interface: a run in one call, or the loss for your own training loop.

    from irgdistill import Distiller
    distiller = Distiller(teacher, student)  # any two modules that return logits
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
from irgdistill.losses import Batch, Counterpart, Learner, build_loss, with_mean_logits
from irgdistill.matching import Level, Output, Plan, Tap, Tapped
from irgdistill.matching import match as match_levels
from irgdistill.models import Network
from irgdistill.training import check_classes, difference

Size = int | tuple[int, int]
"""Pixels of a square, or height and width."""


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


def match(
    teacher: nn.Module,
    student: nn.Module,
    *,
    input_size: Size | None = None,
    teacher_input_size: Size | None = None,
    **overrides: Any,
) -> Plan:
    """Match the stages of two networks. `overrides`: keys of the section `matching` (levels, skip, taps_…).

    Uses shapes alone; the networks may be on any device and do not change. `input_size`, `teacher_input_size`: pixels,
    one number or (height, width), of a module that is no timm model; default: 224. Raises UserError: a module that does
    not run at its size or does not return logits (B, K), no stage that can be tapped, an override that names an unknown
    block or resolution.
    """
    config = load_config(flags={f"matching.{name}": value for name, value in overrides.items()}).matching
    own = _network(student, "student", input_size)
    return match_levels(_network(teacher, "teacher", teacher_input_size).levels(), own.levels(), config)


class Distiller(nn.Module):
    """Teacher, student and the loss between them, for your own training loop.

    `parameters()`, `state_dict()` and `train()` cover the student and the `adapters` that some methods train beside it
    (the convolutions of `fitnet` and `fsp`). The teacher is frozen, runs in eval mode, and moves along with `to()`.
    Hooks are on the networks during a call only. Relations span the images of one call, under DDP those of each
    process; a single image has none.
    """

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module] | None,
        student: nn.Module,
        method: str = AUTO,
        settings: Mapping[str, Any] | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        input_size: Size | None = None,
        teacher_input_size: Size | None = None,
    ) -> None:
        """`teacher`, `student`: any modules that return logits (B, K); None for the method `none`; a list of several
        teachers, whose shares in the means are `teacher_weights` (default: equal).

        `settings`: keys of the configuration that define the loss, such as `{"losses.kd.temperature": 2,
        "matching.skip": [4]}`. The sizes are those of `match`. Raises UserError: unknown method or key, a module that
        does not run, networks that do not match, different classes if a term compares logits.
        """
        super().__init__()
        for key in settings or {}:
            if not key.startswith(("losses.", "matching.")):
                raise UserError(f"{key!r} does not define the loss: settings take keys of losses and matching")
        self.config = load_config(flags={**(settings or {}), "method": method})
        for name in self.config.losses.comparing("booster"):
            raise UserError(
                f"{name} trains a second network from scratch: irgdistill distill --method {name} builds it"
            )
        teachers = _listed(teacher) if self.config.uses_teacher else []
        if self.config.uses_teacher and not teachers:
            raise UserError(f"method {method!r} needs a teacher")
        self._weights = _shares(teacher_weights, len(teachers))
        self._answers = list[bool]()
        matched = [Counterpart()]
        if teachers:
            own = _network(student, "student", input_size)
            matched = self._match([_network(model, "teacher", teacher_input_size) for model in teachers], own)
        self.plans = [it.matched for it in matched if it.matched is not None]
        """The matched stages of each teacher; none if no term compares stages."""
        self._embedding: Pooling | None = None if matched[0].embedding_widths is None else "auto"
        self.student = student
        self.loss = build_loss(
            self.config.losses,
            matched[0].matched,
            embedding_widths=matched[0].embedding_widths,
            weight=matched[0].weight,
            others=matched[1:],
        )
        self.adapters = self.loss.adapters().to(next(student.parameters()).device)
        # In a tuple, so that the teachers' weights are not among this module's parameters.
        self._teachers = tuple(model.requires_grad_(False) for model in teachers)

    def _match(self, teachers: Sequence[Network], student: Network) -> list[Counterpart]:
        """Choose the method, if it is `auto`, and match every teacher. Raises UserError as `__init__`."""
        classes = [str(i) for i in range(student.num_classes)]
        self._answers = [not difference(teacher, classes) for teacher in teachers]
        self.config = self.config.with_method(DEFAULT_METHOD if all(self._answers) else ENCODER_METHOD)
        check_classes(self.config, teachers, classes)
        losses, levels = self.config.losses, list[Level]()
        embeds, stages = bool(losses.comparing("embedding")), bool(losses.comparing(*STAGE_KINDS))
        if stages:
            levels = student.levels()
        return [
            Counterpart(
                match_levels(teacher.levels(), levels, self.config.matching) if stages else None,
                (student.embedding_width(), teacher.embedding_width()) if embeds else None,
                weight,
            )
            for teacher, weight in zip(teachers, self._weights, strict=True)
        ]

    @property
    def plan(self) -> Plan | None:
        """The matched stages of the first teacher; None if no term compares stages."""
        return self.plans[0] if self.plans else None

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        teacher_images: Tensor | Sequence[Tensor] | None = None,
        progress: float = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images (B, 3, H, W), normalised; labels (B,) class indices or (B, K) probabilities -> loss, terms.

        The loss is a scalar, Σ weight · term; the terms are the raw means by name, detached. `teacher_images`
        (B, 3, H', W'): the same crops at the teacher's size and normalisation, if these differ; a list has those of
        each teacher. `progress`: share of the training that is done, 0 to 1, by which hints fade out. With terms on two
        views of each image, a batch holds all first views and then all second ones, in the same order.
        """
        student = _look(self.student, images, self.loss.where("student"), self._embedding, self.adapters)
        seen = _one_each(images if teacher_images is None else teacher_images, len(self._teachers))
        with torch.no_grad():
            taught = [
                _look(model.eval(), own, self.loss.where("teacher", number), self._embedding)
                for number, (model, own) in enumerate(zip(self._teachers, seen, strict=True))
            ]
        with torch.autocast(images.device.type, enabled=False):
            taught = with_mean_logits(taught, self._weights, self._answers)
            batch = Batch(student, labels, taught[0] if taught else None, taught[1:])
            total, raw, _ = self.loss.losses(batch, progress)
            return total, {name: value.detach() for name, value in raw.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        for teacher in self._teachers:
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


def _network(model: nn.Module, role: str, size: Size | None) -> Network:
    """Wrap a network. Raises UserError: no module, or one that is not of timm and does not run at its size."""
    if not isinstance(model, nn.Module):
        raise UserError(f"the {role} is a {type(model).__name__}, not a torch.nn.Module")
    network = Network.of(model, size=(size, size) if isinstance(size, int) else size)
    if not network.from_timm:
        try:
            network.check_output()
        except UserError as error:
            option = "input_size" if role == "student" else "teacher_input_size"
            raise UserError(f"the {role}: {error}; another size: {option}=…") from None
    return network


def _listed(teacher: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    if teacher is None:
        return []
    return list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]  # type: ignore[list-item]


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights of the teachers. Raises UserError: not one positive number for each."""
    if weights is None:
        return [1.0] * count
    if len(weights) != count or not all(weight > 0 for weight in weights):
        raise UserError(f"teacher_weights {list(weights)}: expected {count} positive numbers, one for each teacher")
    return list(weights)


def _one_each(images: Tensor | Sequence[Tensor], count: int) -> list[Tensor]:
    """The images of each teacher. Raises UserError: a list of another length."""
    if isinstance(images, Tensor):
        return [images] * count
    if len(images) != count:
        raise UserError(f"teacher_images holds {len(images)} tensors: expected one, or one for each of {count}")
    return list(images)
