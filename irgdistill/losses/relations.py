"""Terms on relations between the images of a batch: edges and transformations (Liu et al., CVPR 2019).

The batch is that of all processes of `world`. Each gives the mean over its own rows; the mean of these over the
processes, which DDP takes of their gradients, is the mean over the whole relation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from irgdistill.graph import edge_loss, transformation_loss
from irgdistill.losses.term import Batch, Term
from irgdistill.matching import Ends, Plan, tap_name
from irgdistill.runtime import World

LEAST_MOVEMENT = 0.01
"""Share of the features' length below which a stage counts as not yet moving its images: it has no relation to teach.
At a hundredth, a stage's gradient is at most about a hundred times that of one that moves them by their length."""


class Edges(Term):
    """Teacher's last block against the student's last K blocks of the last stage, mean over the K and over (B, B).

    K = 1 is the paper's one-to-one, more its one-to-many (section 3.2). Each loss is 2/B times the authors' Euclidean
    loss, and its gradient 4/B times theirs, which pushes one end of each pair only.
    """

    def __init__(self, plan: Plan, blocks: int = 1, world: World | None = None) -> None:
        self.teacher_taps, self.student_taps = (plan.pairs[-1].teacher.exit,), plan.student_tail(blocks)
        self.world = world or World()

    def __call__(self, batch: Batch) -> Tensor:
        rows = self.world.rows(len(batch.student.logits))
        [teacher] = [self.world.gather(batch.teacher.features[tap_name(tap)]) for tap in self.teacher_taps]
        students = [self.world.gather(batch.student.features[tap_name(tap)]) for tap in self.student_taps]
        return torch.stack([edge_loss(student, teacher, rows, self.world.maximum) for student in students]).mean()


class Transformations(Term):
    """First to last block of every stage, mean over the stages and over (B,). Section 3.3.

    Only the B movements are compared, so the two networks may differ in width. Per stage 2/B times the authors' loss
    and gradient. A stage that hardly moves its images (`LEAST_MOVEMENT`) gives zero, with zero gradient.
    """

    def __init__(self, stages: Sequence[tuple[Ends, Ends]], world: World | None = None) -> None:
        self.teacher_taps = [tap for teacher, _ in stages for tap in teacher]
        self.student_taps = [tap for _, student in stages for tap in student]
        self.teacher_ends, self.student_ends = zip(*([_names(ends) for ends in pair] for pair in stages), strict=True)
        self.world = world or World()

    def __call__(self, batch: Batch) -> Tensor:
        student = [(batch.student.features[first], batch.student.features[last]) for first, last in self.student_ends]
        teacher = [(batch.teacher.features[first], batch.teacher.features[last]) for first, last in self.teacher_ends]
        return transformation_loss(student, teacher, self.world.maximum, LEAST_MOVEMENT)


def _names(ends: Ends) -> tuple[str, str]:
    first, last = ends
    return tap_name(first), tap_name(last)
