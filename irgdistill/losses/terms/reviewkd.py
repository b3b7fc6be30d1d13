"""Knowledge review (Chen et al., CVPR 2021): a stage of the teacher teaches the student's stages from there on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill import matching
from irgdistill.config import Fade
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Term, TermContext, TermSettings, term
from irgdistill.losses.terms.maps import mappable, same_size

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from irgdistill import graph
    from irgdistill.losses import review
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")
    graph, review = lazy("irgdistill.graph"), lazy("irgdistill.losses.review")

PYRAMID = (4, 2, 1)
"""Sides to which maps are pooled beside their own size."""


def hierarchical_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two maps (B, C, H, W), and half as much at each smaller side; over the sum of the factors.

    The authors' hierarchical context loss. Maps of different sizes are pooled to the smaller first (theirs: the
    student's is interpolated to the teacher's).
    """
    student, teacher = same_size(graph.widen(student), graph.widen(teacher))
    total, factor, factors = F.mse_loss(student, teacher), 1.0, 1.0
    for side in PYRAMID:
        if side < student.shape[2]:
            factor /= 2
            here, there = (F.adaptive_avg_pool2d(x, side) for x in (student, teacher))
            total, factors = total + factor * F.mse_loss(here, there), factors + factor
    return total / factors


@term("reviewkd", weight=20.0, compares="maps", source="Chen et al. 2021", place=17)
class KnowledgeReview(Term):
    """Maps of every stage, into which the student's deeper stages are fused.

    `hierarchical_loss` of the stages and of the mean over the last map, mean over all of them. Weight 20: the authors'
    5 for resnet32x4 -> resnet8x4 on the sum, which is over four there. Their maps are those before the last ReLU of a
    stage, these are block outputs.
    """

    class Settings(TermSettings):
        rise: Fade | None = (0.0, 0.0833)
        """Shares of the training between which the weight rises from 0; default: the authors' 20 of 240 epochs."""

    def __init__(self, settings: Settings, context: TermContext) -> None:
        stages = mappable([(pair.teacher.exit, pair.student.exit) for pair in context.plan.pairs], "reviewkd")
        self.teacher_maps, self.student_maps = zip(*stages, strict=True)
        self.adapter = review.Review([(teacher, student) for teacher, student in stages])

    def __call__(self, batch: Batch) -> Tensor:
        maps = [batch.teacher.maps[matching.tap_name(tap)] for tap in reversed(self.teacher_maps)]
        teacher = [maps[0].mean((2, 3), keepdim=True), *maps]
        student = batch.student.adapted["reviewkd"]
        return torch.stack([hierarchical_loss(student[str(i)], there) for i, there in enumerate(teacher)]).mean()
