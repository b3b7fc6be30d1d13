"""Terms on relations between the images of a batch: edges and transformations (Liu et al., CVPR 2019).

The batch is that of all processes of `world`. Each gives the mean over its own rows; the mean of these over the
processes, which DDP takes of their gradients, is the mean over the whole relation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from irgdistill import matching
from irgdistill.config import METHOD, Count, Flag, Weight
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Skip, Term, TermContext, TermSettings, term

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from irgdistill import graph
    from irgdistill.matching import Ends
else:
    torch, graph = lazy("torch"), lazy("irgdistill.graph")

LEAST_MOVEMENT = 0.01
"""Share of the features' length below which a stage counts as not yet moving its images: it has no relation to teach.
At a hundredth, a stage's gradient is at most about a hundred times that of one that moves them by their length."""


@term("edges", compares="features", source="Liu et al. 2019", place=3)
class Edges(Term):
    """Edge matrices of the last stage.

    The teacher's last block against each of the student's last K blocks, mean over the K and over (B, B). K = 1 is the
    paper's one-to-one, more its one-to-many (section 3.2). Each loss is 2/B times the authors' Euclidean loss, and its
    gradient 4/B times theirs, which pushes one end of each pair only.
    """

    class Settings(TermSettings):
        weight: Annotated[Weight | None, Flag("--edges-weight", METHOD, "Weight of the edge matrices.")] = None
        """Factor of this term's mean; default: the method's."""
        blocks: Annotated[Count, Flag("--edge-blocks", METHOD, "1: one-to-one; K: one-to-many.")] = 1
        """1: one-to-one; K: the teacher's last block against each of the student's last K blocks of the last stage."""

    def __init__(self, settings: Settings, context: TermContext) -> None:
        plan, self.world = context.plan, context.world
        self.teacher_taps, self.student_taps = (plan.pairs[-1].teacher.exit,), plan.student_tail(settings.blocks)

    def __call__(self, batch: Batch) -> Tensor:
        rows, tap_name = self.world.rows(len(batch.student.logits)), matching.tap_name
        [teacher] = [self.world.gather(batch.teacher.features[tap_name(tap)]) for tap in self.teacher_taps]
        students = [self.world.gather(batch.student.features[tap_name(tap)]) for tap in self.student_taps]
        losses = [graph.edge_loss(student, teacher, rows, self.world.maximum) for student in students]
        return torch.stack(losses).mean()


@term("transform", compares="features", source="Liu et al. 2019", place=4)
class Transformations(Term):
    """Transformations between the first and last block of every stage, averaged over the stages.

    Section 3.3; a mean over (B,). Only the B movements are compared, so the two networks may differ in width. Per
    stage 2/B times the authors' loss and gradient. A stage that hardly moves its images (`LEAST_MOVEMENT`) gives zero,
    with zero gradient.
    """

    class Settings(TermSettings):
        weight: Annotated[Weight | None, Flag("--transform-weight", METHOD, "Weight of the transformations.")] = None
        """Factor of this term's mean; default: the method's."""

    def __init__(self, settings: Settings, context: TermContext) -> None:
        stages = [ends for pair in context.plan.pairs if (ends := pair.transformation()) is not None]
        if not stages:
            raise Skip("no transformation term: no matched stage has two taps of equal width in both networks")
        self.teacher_taps = [tap for teacher, _ in stages for tap in teacher]
        self.student_taps = [tap for _, student in stages for tap in student]
        self.teacher_ends, self.student_ends = zip(*([_names(ends) for ends in pair] for pair in stages), strict=True)
        self.world = context.world

    def __call__(self, batch: Batch) -> Tensor:
        student = [(batch.student.features[first], batch.student.features[last]) for first, last in self.student_ends]
        teacher = [(batch.teacher.features[first], batch.teacher.features[last]) for first, last in self.teacher_ends]
        return graph.transformation_loss(student, teacher, self.world.maximum, LEAST_MOVEMENT)


def _names(ends: Ends) -> tuple[str, str]:
    first, last = ends
    return matching.tap_name(first), matching.tap_name(last)
