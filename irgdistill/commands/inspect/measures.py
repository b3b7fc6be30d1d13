"""Collects features of N images, and measures how similar two networks' graphs of them are.

N images, D features. Edges and transformations come from `irgdistill.graph`, as in the losses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from irgdistill.data import Loader
from irgdistill.errors import UserError
from irgdistill.graph import edge_matrix, relation_loss, transformation_vector
from irgdistill.losses import LEAST_MOVEMENT, position_loss
from irgdistill.matching import Plan, Tapped, tap_name
from irgdistill.training import agreement, each_pair, linear_cka, nearest_neighbours, pearson, spearman

LOGITS = ":logits"
"""Key of the logits among the pooled features; not the name of any tap."""


THUMBNAIL = 64
"""Pixels of a thumbnail's longer side."""


@dataclass(frozen=True)
class Stage:
    """A stage at which two networks are compared, by the names of its taps."""

    name: str
    teacher: str
    student: str
    teacher_ends: tuple[str, str] | None = None
    """First and last tap of the transformation."""
    student_ends: tuple[str, str] | None = None

    @property
    def title(self) -> str:
        return f"stage {self.name}" if self.name.startswith("/") else self.name


@dataclass(frozen=True)
class Graph:
    """One network's graph of N images at one stage."""

    features: Tensor
    """(N, D)"""
    edges: Tensor
    """(N, N)"""
    moved: Tensor | None
    """(N,) transformation; None if the stage has none"""


@dataclass(frozen=True)
class StageComparison:
    """The graphs of all networks at one stage."""

    stage: Stage
    graphs: dict[str, Graph]
    """Label of a network -> its graph; the teacher first."""
    similarities: dict[str, dict[str, Any]]
    """Label of a student -> its similarity to the teacher."""


@dataclass(frozen=True)
class Features:
    """Outputs of several networks for the same N images."""

    by_network: list[dict[str, Tensor]]
    """For each network: tap name (or LOGITS) -> (N, D) float32 on the CPU."""
    labels: Tensor
    """(N,)"""
    positions: list[dict[str, float]]
    """For each network: tap name -> correlation of its graphs of an image's positions with the first network's."""
    thumbnails: list[Tensor]
    """N times (3, h, w) uint8: the crop that the networks took."""


def stages_of(plan: Plan, logits: bool) -> list[Stage]:
    """The plan's stages with unique names, followed by the logits if asked for."""
    count = Counter(pair.name for pair in plan.pairs)
    stages = []
    for number, pair in enumerate(plan.pairs, 1):
        moved = pair.transformation()
        teacher_ends, student_ends = ((tap_name(a), tap_name(b)) for a, b in moved) if moved else (None, None)
        name = pair.name if count[pair.name] == 1 else f"{pair.name} part {number}"
        stages.append(Stage(name, tap_name(pair.teacher.exit), tap_name(pair.student.exit), teacher_ends, student_ends))
    return stages + [Stage("logits", LOGITS, LOGITS)] * logits


def draw_evenly(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Positions of up to `count` images, sorted by class, with as equal numbers of each class as possible.

    With the same seed, a larger draw contains a smaller one.
    """
    rng = np.random.default_rng(seed)
    classes = np.asarray(labels)
    turn = np.empty(len(classes), dtype=np.int64)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        turn[rng.permutation(members)] = np.arange(len(members))
    order = rng.permutation(int(classes.max(initial=0)) + 1)
    chosen = np.lexsort((order[classes], turn))[:count]
    return [int(i) for i in sorted(chosen, key=lambda i: (classes[i], i))]


@torch.no_grad()
def collect_features(networks: Sequence[Tapped], loader: Loader) -> Features:
    """Run all `networks` (in eval mode) over `loader` and keep pooled features, labels and thumbnails.

    Where all have grids, in the same order of stages, the graphs of positions are compared at once: `positions` as in
    the loss, mean over images and positions. Raises UserError: no readable image, or features that are not finite.
    """
    features: list[dict[str, list[Tensor]]] = [{} for _ in networks]
    positions: list[dict[str, float]] = [{} for _ in networks]
    labels: list[Tensor] = []
    thumbnails: list[Tensor] = []
    for images, targets in loader.epoch():
        outputs = [network(images) for network in networks]
        for output, kept, sums in zip(outputs, features, positions, strict=True):
            for there, (name, here) in zip(outputs[0].grids.values(), output.grids.items(), strict=True):
                sums[name] = sums.get(name, 0.0) + len(images) * (1 - float(position_loss(here, there)))
            for name, value in {**output.features, LOGITS: output.logits}.items():
                kept.setdefault(name, []).append(value.float().cpu())
        labels.append(targets.cpu())
        thumbnails += _thumbnails(images)
    if not labels:
        raise UserError("none of the images could be read")
    joined = [{name: torch.cat(parts) for name, parts in kept.items()} for kept in features]
    for tensors, network in zip(joined, networks, strict=True):
        for name, value in tensors.items():
            if not value.isfinite().all():
                where = "logits" if name == LOGITS else name
                raise UserError(f"{type(network.model).__name__} returns values that are not finite at {where}")
    means = [{name: total / len(thumbnails) for name, total in sums.items()} for sums in positions]
    return Features(joined, torch.cat(labels), means, thumbnails)


def _thumbnails(images: Tensor) -> list[Tensor]:
    height, width = images.shape[-2:]
    scale = THUMBNAIL / max(height, width)
    if scale < 1:
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        images = F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255)
    return list(images.byte().cpu())


def graph_of(features: Mapping[str, Tensor], tap: str, ends: tuple[str, str] | None) -> Graph:
    """The graph at `tap`, and the transformation between `ends`."""
    moved = None if ends is None else transformation_vector(features[ends[0]], features[ends[1]], least=LEAST_MOVEMENT)
    return Graph(features[tap], edge_matrix(features[tap]), moved)


def compare_graphs(
    stages: Sequence[Stage], labels: Sequence[str], features: Features, neighbours: int
) -> list[StageComparison]:
    """Compare the graphs of every student with the teacher's at every stage. The first of `labels` is the teacher."""
    comparisons = []
    for stage in stages:
        graphs = {}
        for number, (label, tensors) in enumerate(zip(labels, features.by_network, strict=True)):
            tap, ends = (stage.student, stage.student_ends) if number else (stage.teacher, stage.teacher_ends)
            graphs[label] = graph_of(tensors, tap, ends)
        teacher = graphs[labels[0]]
        numbers = {
            label: {**similarity(teacher, graphs[label], neighbours), "positions": positions.get(stage.student)}
            for label, positions in zip(labels[1:], features.positions[1:], strict=True)
        }
        comparisons.append(StageComparison(stage, graphs, numbers))
    return comparisons


def similarity(teacher: Graph, student: Graph, neighbours: int) -> dict[str, Any]:
    """Similarity of two graphs of the same images; None for a number that is not defined.

    edges: `mse` is the value of the loss; `pearson` and `spearman` count every pair of images once; `neighbours` is the
    mean share of common images among the nearest `neighbours`; `cka` is linear. transformation: over images.
    """
    a, b = each_pair(teacher.edges), each_pair(student.edges)
    informative = bool(a.any()) and bool(b.any())
    common = None
    if informative:
        nearest = (nearest_neighbours(graph.edges, neighbours) for graph in (teacher, student))
        common = agreement(*nearest)
    edges = {
        "mse": float(relation_loss(student.edges, teacher.edges)),
        "pearson": pearson(a, b),
        "spearman": spearman(a, b),
        "neighbours": common,
        "cka": linear_cka(teacher.features, student.features),
    }
    if teacher.moved is None or student.moved is None:
        return {"edges": edges, "transformation": None}
    moved = {
        "mse": float(relation_loss(student.moved, teacher.moved)),
        "pearson": pearson(teacher.moved, student.moved),
        "spearman": spearman(teacher.moved, student.moved),
    }
    return {"edges": edges, "transformation": moved}
