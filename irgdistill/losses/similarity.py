"""Terms on relations between the images of a batch, by other measures than IRG's: RKD, SP, PKT.

All look at the last matched stage. The batch is that of all processes of `world`: each gives the mean over its own rows
(see losses/relation.py). B images, b of them here, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from irgdistill.graph import edge_matrix, unit, widen
from irgdistill.losses.maps import mappable
from irgdistill.losses.term import Batch, Term
from irgdistill.matching import Plan, tap_name
from irgdistill.runtime import World

EVERY = slice(None)


def distances(features: Tensor) -> Tensor:
    """(B, D) -> (B, B): Euclidean distances over the mean of the positive ones. Park et al. 2019, equations 5 and 6.

    The mean carries its gradient, as in the authors' code. Equal features give zeros with zero gradient.
    """
    squared = edge_matrix(features)  # over their maximum, which cancels
    there = squared > 0
    lengths = torch.where(there, torch.where(there, squared, 1).sqrt(), 0)
    return lengths / (lengths.sum() / there.sum().clamp(min=1)).where(there.any(), 1)


def angles(features: Tensor, rows: slice = EVERY) -> Tensor:
    """(B, D) -> (b, B, B): cosine of the angle at image i between images j and k. Park et al. 2019, equation 8."""
    x = widen(features)
    directions = unit(x[None, :] - x[rows, None])
    return directions @ directions.transpose(1, 2)


def rkd_loss(student: Tensor, teacher: Tensor, angle: float = 2.0, rows: slice = EVERY) -> Tensor:
    """Huber loss of distances, mean over (b, B), and `angle` times that of angles, mean over (b, B, B).

    Park et al. 2019, equations 7 and 9. Features (B, D) and (B, D'); memory grows with b·B².
    """
    distance = F.smooth_l1_loss(distances(student)[rows], distances(teacher)[rows].to(widen(student)))
    if angle == 0:
        return distance
    return distance + angle * F.smooth_l1_loss(angles(student, rows), angles(teacher, rows).to(widen(student)))


def similarity_matrix(features: Tensor, rows: slice = EVERY) -> Tensor:
    """(B, …) -> (b, B): products of flattened features, each row of unit length. Tung & Mori 2019, equation 2."""
    x = widen(features.flatten(1))
    return unit(x[rows] @ x.T)


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
    x = unit(widen(features))
    kernel = (x[rows] @ x.T + 1).clamp(min=0) / 2
    return kernel / kernel.sum(1, keepdim=True)


def probability_loss(student: Tensor, teacher: Tensor, rows: slice = EVERY, eps: float = 1e-7) -> Tensor:
    """KL(teacher ‖ student) of the probabilities of neighbours, mean over images. Passalis & Tefas 2018, equation 6.

    The paper's is the sum over images, the authors' code the mean over (B, B), 1/B of this.
    """
    p, q = probabilities(teacher, rows), probabilities(student, rows)
    return (p * ((p + eps) / (q + eps)).log()).sum(1).mean()


class _LastStage(Term):
    """A term on the last stage's features of all processes."""

    def __init__(self, plan: Plan, world: World | None = None) -> None:
        self.teacher, self.student = plan.pairs[-1].teacher.exit, plan.pairs[-1].student.exit
        self.world = world or World()

    def gathered(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> tuple[Tensor, Tensor, slice]:
        """What both networks have at this stage, over all images, and the rows of this process's."""
        own, other = student[tap_name(self.student)], teacher[tap_name(self.teacher)]
        return self.world.gather(own), self.world.gather(other), self.world.rows(len(own))


class _PooledLastStage(_LastStage):
    def __init__(self, plan: Plan, world: World | None = None) -> None:
        super().__init__(plan, world)
        self.teacher_taps, self.student_taps = (self.teacher,), (self.student,)


class Relational(_PooledLastStage):
    """`rkd_loss` of the pooled features. Weight 25 with `angle` 2: the authors' 25 on distances, 50 on angles."""

    def __init__(self, plan: Plan, angle: float = 2.0, world: World | None = None) -> None:
        super().__init__(plan, world)
        self.angle = angle

    def __call__(self, batch: Batch) -> Tensor:
        student, teacher, rows = self.gathered(batch.student.features, batch.teacher.features)
        return rkd_loss(student, teacher, self.angle, rows)


class Similarity(_LastStage):
    """`similarity_loss` of the whole maps. Weight 3000: the paper's gamma, which is on the same mean."""

    def __init__(self, plan: Plan, world: World | None = None) -> None:
        super().__init__(plan, world)
        self.teacher_maps, self.student_maps = (self.teacher,), (self.student,)
        mappable([(self.teacher, self.student)], "sp")

    def __call__(self, batch: Batch) -> Tensor:
        student, teacher, rows = self.gathered(batch.student.maps, batch.teacher.maps)
        return similarity_loss(student, teacher, rows)


class Probabilities(_PooledLastStage):
    """`probability_loss` of the pooled features. Weight 470: RepDistiller's 30,000 on the mean over (64, 64)."""

    def __call__(self, batch: Batch) -> Tensor:
        student, teacher, rows = self.gathered(batch.student.features, batch.teacher.features)
        return probability_loss(student, teacher, rows)
