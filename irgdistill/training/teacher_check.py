"""The check of the teacher before training: its accuracy, and what may be wrong where that is low."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor

from irgdistill.data import Loader, eval_loader
from irgdistill.errors import UserError
from irgdistill.io import Report
from irgdistill.matching import Tapped
from irgdistill.models import Network, Preprocess
from irgdistill.training.evaluation import Metrics, evaluate

if TYPE_CHECKING:
    from irgdistill.training.components import RunComponents

CHECK_IMAGES = 2000
"""Validation images on which the teacher is evaluated."""


COMPARED_IMAGES = 200
"""Validation images on which other normalisations are tried."""


FAR = 10.0
"""Points of top-1 by which another normalisation must be better to be named."""


NORMALISATIONS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "ImageNet's normalisation": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "Inception's normalisation": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "no normalisation": ((0.0,) * 3, (1.0,) * 3),
    "CLIP's normalisation": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "CIFAR's normalisation": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
"""Name -> mean and std of a common normalisation, for pixels in [0, 1]."""


class Remedy(NamedTuple):
    """Something that makes the teacher better."""

    top1: float
    """Percent that it then reaches."""
    text: str


def check_teachers(run: RunComponents, report: Report) -> dict[str, Any] | None:
    """Evaluate the live teachers -> the record of the first, if it is one. Raises UserError if one is near chance.

    Those whose classes are not the data's are not evaluated. Warns where a common normalisation fits far better than
    the teacher's.
    """
    setup, records = run.setup, dict[int, dict[str, Any]]()
    if run.teacher is None or not run.config.teacher.check:
        return None
    for number, (known, member) in enumerate(zip(setup.teachers, run.teacher.members, strict=True)):
        if member.network is None or not known.answers or not run.config.all_teachers[number].check:
            continue
        if not setup.splits.labelled:
            report.warn("the validation images have no labels: the teacher's accuracy is not checked")
            return None
        records[number] = _check_teacher(run, known.network, member.network, report)
    return records.get(0)


def _check_teacher(run: RunComponents, teacher: Network, network: Tapped, report: Report) -> dict[str, Any]:
    """Evaluate a teacher with its own preprocessing -> its record. Raises UserError if it is near chance."""
    loader = _loader(run, teacher, CHECK_IMAGES)
    metrics = evaluate(network, loader, run.autocast, world=run.world)
    top1, chance = metrics.top1 or 0.0, 100 / len(run.setup.splits.classes)
    report.line(f"teacher {teacher.name}: top-1 {top1:.2f} on {metrics.images} validation images")
    near_chance = _is_near(top1, chance)
    remedies = list[Remedy]()
    if (near_chance or (teacher.foreign and top1 < 100 - FAR)) and not run.setup.splits.streaming:
        remedies = _better_normalisations(run, teacher, network)
        if near_chance:
            remedies.append(_other_order(network, loader, run))
        remedies = [remedy for remedy in remedies if not _is_near(remedy.top1, chance)]
    advice = max(remedies, key=lambda remedy: remedy.top1).text if remedies else ""
    if near_chance:
        raise UserError(
            f"the teacher reaches top-1 {top1:.1f} on this data, chance is {chance:.1f}: "
            f"{advice or 'its classes may be in another order, its mean/std or weights wrong'}; "
            "--skip-teacher-check trains all the same"
        )
    if advice:
        report.warn(f"teacher {teacher.name}: {advice}")
    return {"kind": "teacher", "top1": top1, "images": metrics.images}


def _is_near(top1: float, chance: float) -> bool:
    return top1 < chance + 0.1 * (100 - chance)


def _loader(run: RunComponents, teacher: Network, limit: int) -> Loader:
    """Validation images as the teacher wants them."""
    return eval_loader(
        run.setup.splits, run.config.data, teacher.input, run.device, run.unreadable, limit=limit, world=run.world
    )


def _better_normalisations(run: RunComponents, teacher: Network, network: Tapped) -> list[Remedy]:
    """Common normalisations with which the teacher is far better, and their options."""
    loader, own = _loader(run, teacher, COMPARED_IMAGES), (teacher.input.mean, teacher.input.std)
    found = dict[str, Metrics]()
    for name, (mean, std) in {"own": own, **NORMALISATIONS}.items():
        view = Preprocess(teacher.input.size, mean, std).to(run.device)
        last = network.memory_format == torch.channels_last
        found[name] = evaluate(Tapped(network.model, view, channels_last=last), loader, run.autocast, world=run.world)
    now = found.pop("own").top1 or 0.0
    return [
        Remedy(
            top1,
            f"it reaches top-1 {top1:.1f} with {name}, and {now:.1f} with its own, on {metrics.images} images; give "
            f"--teacher-mean {_channels(NORMALISATIONS[name][0])} --teacher-std {_channels(NORMALISATIONS[name][1])}",
        )
        for name, metrics in found.items()
        if (top1 := metrics.top1 or 0.0) >= now + FAR
    ]


def _channels(values: tuple[float, ...]) -> str:
    """As an option takes them: one number if all are equal."""
    return ",".join(f"{value:.4g}" for value in (values if len(set(values)) > 1 else values[:1]))


# --- classes in another order -----------------------------------------------------------------------------------------


@torch.no_grad()
def _other_order(network: Tapped, loader: Loader, run: RunComponents) -> Remedy:
    """How well the teacher's answers fit under another order of the classes."""
    labels, answers = list[Tensor](), list[Tensor]()
    for images, own in loader.epoch():
        with run.autocast:
            answers.append(network(images).logits.argmax(1).cpu())
        labels.append(own.cpu())
    top1 = reordered_accuracy(torch.cat(labels), torch.cat(answers)) if labels else 0.0
    return Remedy(
        top1,
        f"its classes are in another order, under which it reaches top-1 {top1:.1f}; name the class folders so that "
        "they sort as its classes do, or give a checkpoint that names its classes",
    )


def reordered_accuracy(labels: Tensor, answers: Tensor) -> float:
    """Top-1 in percent under the one-to-one assignment of answers to labels that fits best; both (N,).

    The assignment is made on every second image of each class and measured on the others, so that chance stays chance.
    """
    order = labels.argsort(stable=True)
    fitted, measured = order[::2], order[1::2]
    pairs, counts = torch.stack([answers[fitted], labels[fitted]], 1).unique(dim=0, return_counts=True)
    assigned: dict[int, int] = {}
    taken = set[int]()
    for i in counts.argsort(descending=True, stable=True).tolist():
        answer, label = pairs[i].tolist()
        if answer not in assigned and label not in taken:
            assigned[answer] = label
            taken.add(label)
    right = sum(assigned.get(int(a)) == int(b) for a, b in zip(answers[measured], labels[measured], strict=True))
    return 100 * right / max(len(measured), 1)
