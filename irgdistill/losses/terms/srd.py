"""A projector and one distance (Miles & Mikolajczyk, AAAI 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill import matching
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, TermContext, TermSettings, term
from irgdistill.losses.terms.similarity import PooledLastStage

if TYPE_CHECKING:
    from torch import Tensor

    from irgdistill import graph
    from irgdistill.losses import adapters
else:
    graph, adapters = lazy("irgdistill.graph"), lazy("irgdistill.losses.adapters")

LEAST = 1e-12
"""Distance below which the loss no longer falls."""


def normalised(features: Tensor, eps: float = 1e-4) -> Tensor:
    """(B, D): each channel with mean 0 and deviation 1 over the images, as a batch norm without parameters."""
    x = graph.widen(features)
    x = x - x.mean(0)
    return x * (x.square().mean(0) + eps).rsqrt()


def soft_maximum_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Log of the mean of |student - teacher|⁴ over (B, D), after `normalised`.

    The authors take the sum: it differs by a constant, which has no gradient.
    """
    difference = normalised(student) - normalised(teacher)
    return difference.square().square().mean().clamp(min=LEAST).log()


@term("srd", weight=2.0, compares="features", source="Miles & Mikolajczyk 2024", place=18)
class ProjectedFeatures(PooledLastStage):
    """Pooled features of the last stage, the student's through a linear layer, both normalised over the batch.

    `soft_maximum_loss` over the images of all processes. Weight 2 beside soft targets of temperature 1 and weight 1:
    the authors' recipe, `--kd-weight 1 --temperature 1`.
    """

    def __init__(self, settings: TermSettings, context: TermContext) -> None:
        super().__init__(settings, context)
        self.adapter = adapters.Project(self.student, self.teacher.channels)

    def __call__(self, batch: Batch) -> Tensor:
        student = batch.student.adapted["srd"]["projected"]
        teacher = batch.teacher.features[matching.tap_name(self.teacher)]
        return soft_maximum_loss(self.world.gather(student), self.world.gather(teacher))
