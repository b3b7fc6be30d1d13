"""Relations between the positions of one image: its own positions are the instances of the graph.

No two images are related, so that any batch will do, and nothing depends on the networks' widths. Logits say nothing
of it: pooling has removed the positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from irgdistill import matching
from irgdistill.config import Positive
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Skip, Term, TermContext, TermSettings, term
from irgdistill.losses.terms.maps import attended, mappable, same_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from irgdistill import graph
else:
    torch, graph = lazy("torch"), lazy("irgdistill.graph")


def position_edges(grid: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, M, M - 1): cosines of each of the M = h·w positions with the others of its image."""
    return graph.off_diagonal(graph.cosine_matrix(grid.flatten(2).transpose(1, 2)))


@term("positions", weight=15.0, compares="grids", source="Siméoni et al. 2025", place=14)
class Positions(Term):
    """Edges between the positions of each image, in every stage.

    A stage's map is averaged over at most 8×8 cells, and where the networks' sizes differ pooled to the smaller. The
    edges are the cosines of the positions' channel vectors; each position's row of them is compared, by `form`, mean
    over positions, images and stages. The teacher's Gram matrix of patches is the target of DINOv3's Gram anchoring
    (there squared differences); LightlyTrain's distillation compares softmaxes of its rows. It is skipped if no stage
    has a map and another term compares features of the stages.
    """

    class Settings(TermSettings):
        form: Literal["pearson", "softmax"] = "pearson"
        """How two rows are compared: `pearson`: 1 - correlation; `softmax`: KL of the rows' softmaxes, for which weight
        6 pulls like 15 of the other."""
        temperature: Positive = 0.1
        """Divisor of the cosines in both softmaxes."""

    def __init__(self, settings: Settings, context: TermContext) -> None:
        stages = attended(context.plan)
        if not stages and context.compared("features"):
            raise Skip("no positions term: no matched stage has a feature map in both networks")
        self.teacher_grids, self.student_grids = zip(*mappable(stages, "positions"), strict=True)
        self.settings = settings

    def __call__(self, batch: Batch) -> Tensor:
        losses = []
        for teacher, student in zip(self.teacher_grids, self.student_grids, strict=True):
            grids = batch.student.grids[matching.tap_name(student)], batch.teacher.grids[matching.tap_name(teacher)]
            here, there = map(position_edges, same_size(*grids))
            if self.settings.form == "pearson":
                losses.append(graph.correlation_loss(here, there))
            else:
                losses.append(graph.softmax_loss(here, there, self.settings.temperature))
        return torch.stack(losses).mean()
