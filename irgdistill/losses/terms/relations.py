"""Terms on relations between the images of a batch: edges and transformations (Liu et al., CVPR 2019).

The batch is that of all processes of `world`. Each gives the mean over its own rows; the mean of these over the
processes, which DDP takes of their gradients, is the mean over the whole relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from irgdistill import matching
from irgdistill.config import METHOD, Count, Flag, Kind, Positive, Weight
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Skip, Term, TermContext, TermSettings, term
from irgdistill.losses.terms.maps import mappable, same_size

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from irgdistill import graph
    from irgdistill.matching import Ends
else:
    torch, F, graph = lazy("torch"), lazy("torch.nn.functional"), lazy("irgdistill.graph")

LEAST_MOVEMENT = 0.01
"""Share of the features' length below which a stage counts as not yet moving its images: it has no relation to teach.
At a hundredth, a stage's gradient is at most about a hundred times that of one that moves them by their length."""


def pooled_to(side: int, grid: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, h', w') with h', w' at most `side`."""
    return F.adaptive_avg_pool2d(grid, (min(side, grid.shape[2]), min(side, grid.shape[3])))


def row_loss(student: Tensor, teacher: Tensor, form: str, temperature: float, rows: slice) -> Tensor:
    """Distance of two graphs row by row, mean over `rows`: (…, B, D) and (…, B, D') of all processes.

    `pearson`: 1 - correlation of the squared distances, which for the unit vectors at positions (ndim 3) are those of
    the cosines; `softmax`: KL of the softmaxes of the cosines.
    """
    if form == "softmax":
        return graph.softmax_loss(graph.cosines(student, rows), graph.cosines(teacher, rows), temperature)
    if student.ndim == 3:
        return graph.correlation_loss(graph.cosines(student, rows), graph.cosines(teacher, rows))
    edges = (graph.off_diagonal(graph.edge_matrix(x)[rows], rows) for x in (student, teacher))
    return graph.correlation_loss(*edges)


@term("edges", compares="features", source="Liu et al. 2019", place=3)
class Edges(Term):
    """Edge matrices of the last stage.

    The teacher's last block against each of the student's last K blocks, mean over the K and over (B, B). K = 1 is the
    paper's one-to-one, more its one-to-many (section 3.2). Each loss is 2/B times the authors' Euclidean loss, and its
    gradient 4/B times theirs, which pushes one end of each pair only.

    The other forms, stages and positions are not the paper's. The paper's maximum lets one pair set the scale of all;
    row by row each image has its own, and its distance from itself is left out. At a position an image is its channel
    vector there, of length 1; the loss is the mean over positions.
    """

    class Settings(TermSettings):
        weight: Annotated[
            Weight | None, Flag("--edges-weight", METHOD, "Weight of the edge matrices.", metavar="WEIGHT")
        ] = None
        """Factor of this term's mean; default: the method's."""
        blocks: Annotated[Count, Flag("--edge-blocks", METHOD, "1: one-to-one; K: one-to-many.", metavar="K")] = 1
        """1: one-to-one; K: the teacher's last block against each of the student's last K blocks of the last stage."""
        form: Literal["paper", "pearson", "softmax"] = "paper"
        """How edges are compared: `paper`: squared differences of the distances over their maximum; row by row,
        `pearson`: 1 - correlation of the squared distances; `softmax`: KL of the softmaxes of the cosines. Weight 10 of
        the second and 5 of the third pull about like 100 of the first."""
        temperature: Positive = 0.1
        """Divisor of the cosines in both softmaxes."""
        stages: Literal["last", "all"] = "last"
        """Stages whose edges are compared, mean over them."""
        grid: Literal[1, 4] = 1
        """1: edges of the pooled features; 4: edges at each of 4×4 positions of the map."""

        def compares(self, declared: frozenset[Kind]) -> frozenset[Kind]:
            return declared if self.grid == 1 else frozenset(("grids",))

    def __init__(self, settings: Settings, context: TermContext) -> None:
        plan, self.world, self.settings = context.plan, context.world, settings
        pairs = [(pair.teacher.exit, pair.student.exit) for pair in plan.pairs[:-1] if settings.stages == "all"]
        pairs += [(plan.pairs[-1].teacher.exit, tap) for tap in plan.student_tail(settings.blocks)]
        self.pairs = pairs if settings.grid == 1 else mappable(pairs, "edges with losses.edges.grid above 1")
        teacher, student = (tuple(dict.fromkeys(taps)) for taps in zip(*self.pairs, strict=True))
        if settings.grid == 1:
            self.teacher_taps, self.student_taps = teacher, student
        else:
            self.teacher_grids, self.student_grids = teacher, student

    def __call__(self, batch: Batch) -> Tensor:
        rows = self.world.rows(len(batch.student.logits))
        vertices = self._pooled(batch) if self.settings.grid == 1 else self._at_positions(batch)
        return torch.stack([self._loss(student, teacher, rows) for student, teacher in vertices]).mean()

    def _pooled(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Vertices (B, D) of student and teacher, of all processes."""
        here, there, name = batch.student.features, batch.teacher.features, matching.tap_name
        teachers = {tap: self.world.gather(there[name(tap)]) for tap in self.teacher_taps}
        return [(self.world.gather(here[name(student)]), teachers[teacher]) for teacher, student in self.pairs]

    def _at_positions(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Vertices (P, B, D) at P positions."""
        here, there, name = batch.student.grids, batch.teacher.grids, matching.tap_name
        pairs = [same_size(here[name(student)], there[name(teacher)]) for teacher, student in self.pairs]
        gathered = [[self.world.gather(pooled_to(self.settings.grid, grid)) for grid in pair] for pair in pairs]
        stages = [[grid.flatten(2).permute(2, 0, 1).contiguous() for grid in pair] for pair in gathered]
        return [(student, teacher) for student, teacher in stages]

    def _loss(self, student: Tensor, teacher: Tensor, rows: slice) -> Tensor:
        if self.settings.form != "paper":
            return row_loss(student, teacher, self.settings.form, self.settings.temperature, rows)
        if student.ndim == 2:
            return graph.edge_loss(student, teacher, rows, self.world.maximum)
        positions = zip(graph.unit(student), graph.unit(teacher), strict=True)
        return torch.stack([graph.edge_loss(*pair, rows, self.world.maximum) for pair in positions]).mean()


@term("transform", compares="features", source="Liu et al. 2019", place=4)
class Transformations(Term):
    """Transformations between the first and last block of every stage, averaged over the stages.

    Section 3.3; a mean over (B,). Only the B movements are compared, so the two networks may differ in width. Per
    stage 2/B times the authors' loss and gradient. A stage that hardly moves its images (`LEAST_MOVEMENT`) gives zero,
    with zero gradient.
    """

    class Settings(TermSettings):
        weight: Annotated[
            Weight | None, Flag("--transform-weight", METHOD, "Weight of the transformations.", metavar="WEIGHT")
        ] = None
        """Factor of this term's mean; default: the method's."""
        over: Literal["layers", "views"] = "layers"
        """`layers`: from the first to the last block of a stage, as in the paper; `views`: at the end of each stage,
        from the first view of an image to its second (`data.second_view`)."""

        def compares(self, declared: frozenset[Kind]) -> frozenset[Kind]:
            return declared if self.over == "layers" else frozenset(("features", "views"))

    def __init__(self, settings: Settings, context: TermContext) -> None:
        self.world, self.over = context.world, settings.over
        exits = [((pair.teacher.exit,) * 2, (pair.student.exit,) * 2) for pair in context.plan.pairs]
        between = [ends for pair in context.plan.pairs if (ends := pair.transformation()) is not None]
        stages = between if self.over == "layers" else exits
        if not stages:
            raise Skip("no transformation term: no matched stage has two taps of equal width in both networks")
        self.teacher_taps = [tap for teacher, _ in stages for tap in teacher]
        self.student_taps = [tap for _, student in stages for tap in student]
        self.teacher_ends, self.student_ends = zip(*([_names(ends) for ends in pair] for pair in stages), strict=True)

    def __call__(self, batch: Batch) -> Tensor:
        student = self._moves(batch.student.features, self.student_ends)
        teacher = self._moves(batch.teacher.features, self.teacher_ends)
        return graph.transformation_loss(student, teacher, self.world.maximum, LEAST_MOVEMENT)

    def _moves(self, features: dict[str, Tensor], ends: Sequence[tuple[str, str]]) -> list[tuple[Tensor, Tensor]]:
        """Where each stage's images come from and go to, (b, D) each."""
        if self.over == "layers":
            return [(features[first], features[last]) for first, last in ends]
        halves = [features[name].chunk(2) for name, _ in ends]
        return [(first, second) for first, second in halves]


def _names(ends: Ends) -> tuple[str, str]:
    first, last = ends
    return matching.tap_name(first), matching.tap_name(last)
