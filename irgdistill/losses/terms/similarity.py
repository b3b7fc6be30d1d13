"""Terms on relations between the images of a batch, by other measures than IRG's: RKD, SP, PKT.

All compare the last matched stage. The batch is that of all processes of `world`: each gives the mean over its own rows
(see `relations`). B images, b of them here, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill import matching
from irgdistill.config import Weight
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Term, TermContext, TermSettings, term
from irgdistill.losses.terms.maps import mappable

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from irgdistill import graph
else:
    torch, F, graph = lazy("torch"), lazy("torch.nn.functional"), lazy("irgdistill.graph")

EVERY = slice(None)


def distances(features: Tensor) -> Tensor:
    """(B, D) -> (B, B): Euclidean distances over the mean of the positive ones. Park et al. 2019, equations 5 and 6.

    The mean carries its gradient, as in the authors' code. Equal features give zeros with zero gradient.
    """
    squared = graph.edge_matrix(features)  # over their maximum, which cancels
    there = squared > 0
    lengths = torch.where(there, torch.where(there, squared, 1).sqrt(), 0)
    return lengths / (lengths.sum() / there.sum().clamp(min=1)).where(there.any(), 1)


def angles(features: Tensor, rows: slice = EVERY) -> Tensor:
    """(B, D) -> (b, B, B): cosine of the angle at image i between images j and k. Park et al. 2019, equation 8."""
    x = graph.widen(features)
    directions = graph.unit(x[None, :] - x[rows, None])
    return directions @ directions.transpose(1, 2)


def rkd_loss(student: Tensor, teacher: Tensor, angle: float = 2.0, rows: slice = EVERY) -> Tensor:
    """Huber loss of distances, mean over (b, B), and `angle` times that of angles, mean over (b, B, B).

    Park et al. 2019, equations 7 and 9. Features (B, D) and (B, D'); memory grows with b·B².
    """
    distance = F.smooth_l1_loss(distances(student)[rows], distances(teacher)[rows].to(graph.widen(student)))
    if angle == 0:
        return distance
    return distance + angle * F.smooth_l1_loss(angles(student, rows), angles(teacher, rows).to(graph.widen(student)))


def similarity_matrix(features: Tensor, rows: slice = EVERY) -> Tensor:
    """(B, …) -> (b, B): products of flattened features, each row of unit length. Tung & Mori 2019, equation 2."""
    x = graph.widen(features.flatten(1))
    return graph.unit(x[rows] @ x.T)


def similarity_loss(student: Tensor, teacher: Tensor, rows: slice = EVERY) -> Tensor:
    """Mean over (b, B) of the squared difference of the similarity matrices. Tung & Mori 2019, equation 4.

    Its rows have unit length, so that the mean shrinks as 1/B: the paper's weight is one for its batch of 128.
    """
    difference = similarity_matrix(student, rows) - similarity_matrix(teacher, rows)
    return difference.square().mean()


def probabilities(features: Tensor, rows: slice = EVERY) -> Tensor:
    """(B, D) -> (b, B): (cosine + 1)/2 over its sum along the row. Passalis & Tefas 2018, equations 3 and 5.

    As in the authors' code an image counts as its own neighbour.
    """
    x = graph.unit(graph.widen(features))
    kernel = (x[rows] @ x.T + 1).clamp(min=0) / 2
    return kernel / kernel.sum(1, keepdim=True)


def probability_loss(student: Tensor, teacher: Tensor, rows: slice = EVERY, eps: float = 1e-7) -> Tensor:
    """KL(teacher ‖ student) of the probabilities of neighbours, mean over images. Passalis & Tefas 2018, equation 6.

    The paper's is the sum over images, the authors' code the mean over (B, B), 1/B of this.
    """
    p, q = probabilities(teacher, rows), probabilities(student, rows)
    return (p * ((p + eps) / (q + eps)).log()).sum(1).mean()


class LastStage(Term):
    """A term on the last matched stage, over the images of all processes."""

    def __init__(self, settings: TermSettings, context: TermContext) -> None:
        self.settings, self.world = settings, context.world
        self.teacher, self.student = context.plan.pairs[-1].teacher.exit, context.plan.pairs[-1].student.exit

    def gathered(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> tuple[Tensor, Tensor, slice]:
        """Both networks' values at this stage, of all images, and the rows of this process."""
        own, other = student[matching.tap_name(self.student)], teacher[matching.tap_name(self.teacher)]
        return self.world.gather(own), self.world.gather(other), self.world.rows(len(own))


class PooledLastStage(LastStage):
    """The same on pooled features."""

    def __init__(self, settings: TermSettings, context: TermContext) -> None:
        super().__init__(settings, context)
        self.teacher_taps, self.student_taps = (self.teacher,), (self.student,)


@term("rkd", weight=25.0, compares="features", source="Park et al. 2019", place=11)
class Relational(PooledLastStage):
    """Distances and angles between images (Park et al. 2019).

    `rkd_loss` of the pooled features. Weight 25 with `angle` 2: the authors' 25 on distances, 50 on angles.
    """

    class Settings(TermSettings):
        angle: Weight = 2.0
        """Factor of the angles beside the distances; 0 saves their B³ numbers."""

    def __call__(self, batch: Batch) -> Tensor:
        student, teacher, rows = self.gathered(batch.student.features, batch.teacher.features)
        return rkd_loss(student, teacher, self.settings.angle, rows)


@term("sp", weight=3000.0, compares="maps", source="Tung & Mori 2019", place=12)
class Similarity(LastStage):
    """Similarities between images (Tung & Mori 2019).

    `similarity_loss` of the whole maps. Weight 3000: the paper's gamma, which is on the same mean.
    """

    def __init__(self, settings: TermSettings, context: TermContext) -> None:
        super().__init__(settings, context)
        self.teacher_maps, self.student_maps = (self.teacher,), (self.student,)
        mappable([(self.teacher, self.student)], "sp")

    def __call__(self, batch: Batch) -> Tensor:
        student, teacher, rows = self.gathered(batch.student.maps, batch.teacher.maps)
        return similarity_loss(student, teacher, rows)


@term("pkt", weight=470.0, compares="features", source="Passalis & Tefas 2018", place=13)
class Probabilities(PooledLastStage):
    """Probabilities of neighbours (Passalis & Tefas 2018).

    `probability_loss` of the pooled features. Weight 470: RepDistiller's 30,000 on the mean over (64, 64).
    """

    def __call__(self, batch: Batch) -> Tensor:
        student, teacher, rows = self.gathered(batch.student.features, batch.teacher.features)
        return probability_loss(student, teacher, rows)
