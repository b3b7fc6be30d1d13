"""Accuracy, loss, calibration and agreement over a loader."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import accuracy
from torch import Tensor

from irgdistill.data import KeptLoader, Loader
from irgdistill.errors import DataError
from irgdistill.io import SELECTING
from irgdistill.losses import soft_targets
from irgdistill.matching import Tapped
from irgdistill.runtime import World

BINS = 15


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Means over all readable images of a loader."""

    top1: float | None = None
    """Percent. This and the next three: None without labels."""
    top5: float | None = None
    """Percent; the first min(5, K) classes."""
    loss: float | None = None
    """Mean cross-entropy, no smoothing."""
    calibration_error: float | None = None
    """Expected calibration error in percent, 15 equal bins of confidence (Guo et al. 2017)."""
    images: int
    images_per_second: float
    """Speed of the forward pass alone, without loading and without the first batch."""
    agreement: float | None = None
    """Percent of images for which student and teacher predict the same class."""
    kl: float | None = None
    """Mean KL(teacher ‖ student) at temperature 1, in nats."""
    knn_top1: float | None = None
    """Percent of images whose class the 20 nearest others predict. This and the next four: of embeddings, for a
    student without classes."""
    teacher_knn_top1: float | None = None
    """The same for the teacher."""
    neighbours: float | None = None
    """Percent of the 10 nearest images that are the teacher's nearest, too."""
    edge_correlation: float | None = None
    """Pearson correlation of the edges with the teacher's."""
    embedding_cosine: float | None = None
    """Mean cosine of the projected embeddings with the teacher's, each minus its mean."""


@torch.no_grad()
def evaluate(
    network: Tapped,
    loader: Loader | KeptLoader,
    autocast: AbstractContextManager[Any],
    teacher: Tapped | None = None,
    world: World | None = None,
    labelled: bool = True,
) -> Metrics:
    """Run `network`, and `teacher` on the same crops, over `loader` in eval mode, and restore the training mode.

    Without labels (`labelled` False) only the agreement is measured. With `world`, every process evaluates its part of
    the images and gets the metrics of all. Raises UserError if no image can be read.
    """
    world = world or World()
    training = network.training
    network.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=loader.device)
    bins = torch.zeros(2, BINS, dtype=torch.float64, device=loader.device)
    images_seen, timed, seconds = 0, 0, 0.0
    for images, labels in loader.epoch():
        with autocast:
            start = now(loader.device)
            logits = network(images).logits.float()
            elapsed = now(loader.device) - start
            other = teacher(images).logits.float() if teacher is not None else None
        if images_seen or len(labels) == loader.images:  # the first batch warms up
            timed, seconds = timed + len(labels), seconds + elapsed
        sums += _batch_sums(logits, labels if labelled else None, other).to(sums)
        if labelled:
            bins += _batch_bins(logits, labels)
        images_seen += len(labels)
    network.train(training)
    sums, bins = world.sum(sums), world.sum(bins)
    counts = torch.tensor([images_seen, timed, seconds], dtype=torch.float64, device=loader.device)
    images_seen, timed, seconds = world.sum(counts).tolist()
    if not images_seen:
        raise DataError("no validation image can be read")
    top1, top5, loss, agreement, kl = (sums / max(images_seen, 1)).tolist()
    confidence, correct = bins
    calibration = 100 * float((confidence - correct).abs().sum()) / max(images_seen, 1)
    return Metrics(
        top1=top1 if labelled else None,
        top5=top5 if labelled else None,
        loss=loss if labelled else None,
        calibration_error=calibration if labelled else None,
        images=int(images_seen),
        images_per_second=timed / max(seconds / world.size, 1e-9),
        agreement=agreement if teacher is not None else None,
        kl=kl if teacher is not None else None,
    )


def now(device: torch.device) -> float:
    """The time in seconds at which the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _batch_sums(logits: Tensor, labels: Tensor | None, teacher: Tensor | None) -> Tensor:
    """Sums over the batch (5,) of top-1 %, top-5 %, loss, agreement % and KL; 0 for those that are unknown."""
    count = len(logits)
    values = [logits.new_zeros(())] * 3
    if labels is not None:
        values = [*accuracy(logits, labels, topk=(1, 5)), F.cross_entropy(logits, labels)]
    if teacher is not None and teacher.shape == logits.shape:
        same = (logits.argmax(1) == teacher.argmax(1)).float().mean()
        values += [100 * same, soft_targets(logits, teacher, 1.0)]
    else:
        values += [logits.new_zeros(())] * 2
    return torch.stack(values) * count


def _batch_bins(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums of confidence and of correct predictions per bin (2, 15)."""
    confidence, predicted = logits.softmax(1).max(1)
    index = (confidence.nan_to_num() * BINS).long().clamp(max=BINS - 1)
    rows = torch.stack([confidence, (predicted == labels).float()]).double()
    return torch.zeros(2, BINS, dtype=torch.float64, device=logits.device).index_add_(1, index, rows)


# --- metrics in records -----------------------------------------------------------------------------------------------


def metric_name(metrics: Mapping[str, Any]) -> str:
    """The metric that selects the best weights: the first of `SELECTING` that is measured."""
    return next((name for name in SELECTING if name in metrics), "agreement")


def score(metrics: Mapping[str, Any]) -> str:
    """That metric with its value, such as `top-1 91.20`."""
    name = metric_name(metrics)
    return f"{SELECTING[name]} {metrics[name]:.2f}"


def details(metrics: Metrics) -> str:
    """The other metrics of an epoch, in words."""
    found = {
        "top-5": (metrics.top5, ".2f"),
        "val loss": (metrics.loss, ".3f"),
        "KL": (metrics.kl, ".3f"),
        "teacher's": (metrics.teacher_knn_top1, ".2f"),
        "shared neighbours": (None if metrics.knn_top1 is None else metrics.neighbours, ".2f"),
        "edge correlation": (metrics.edge_correlation, ".3f"),
        "embedding cosine": (metrics.embedding_cosine, ".3f"),
    }
    return "  ".join(f"{title} {value:{form}}" for title, (value, form) in found.items() if value is not None)
