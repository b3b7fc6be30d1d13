"""DIST (Huang et al., NeurIPS 2022): correlations of predictions within an image and within a class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill.config import Positive, Weight
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Term, TermContext, TermSettings, term

if TYPE_CHECKING:
    from torch import Tensor

    from irgdistill import graph
else:
    graph = lazy("irgdistill.graph")


@term("dist", weight=2.0, compares="logits", all_logits=True, source="Huang et al. 2022", place=15)
class Dist(Term):
    """Correlations of the predictions, of each image over the classes and of each class over the images.

    T²·(inter·(1 - ρ of the rows) + intra·(1 - ρ of the columns)) of the probabilities at temperature T: the mean over
    images, and the mean over classes, whose correlations span the images of all processes. Weight 2, temperature 4 and
    the factor T² are those of the authors' CIFAR runs; on ImageNet their temperature is 1. Rows and columns without
    variation count as zero.
    """

    class Settings(TermSettings):
        temperature: Positive = 4.0
        """Divisor of the logits in both softmaxes; the term is multiplied by its square."""
        inter: Weight = 1.0
        """Factor of the correlations over the classes."""
        intra: Weight = 1.0
        """Factor of the correlations over the images."""

    def __init__(self, settings: Settings, context: TermContext) -> None:
        self.settings, self.world = settings, context.world

    def __call__(self, batch: Batch) -> Tensor:
        settings = self.settings
        both = batch.student.logits, batch.teacher.logits
        student, teacher = ((graph.widen(z) / settings.temperature).softmax(1) for z in both)
        rows = graph.correlation_loss(student, teacher)
        columns = graph.correlation_loss(self.world.gather(student).T, self.world.gather(teacher).T)
        loss: Tensor = settings.temperature**2 * (settings.inter * rows + settings.intra * columns)
        return loss
