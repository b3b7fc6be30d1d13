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


def position_loss(student: Tensor, teacher: Tensor, temperature: float | None = None) -> Tensor:
    """Distance of the rows of cosines between the positions of each image, mean over the M positions and the images.

    Grids (B, C, h, w) and (B, D, h', w') are brought to one size, with M positions. 1 - correlation of two rows without
    their diagonal, or with a temperature the KL of their softmaxes.
    """
    grids = same_size(student, teacher)
    here, there = (graph.cosines(x.flatten(2).transpose(1, 2).contiguous()) for x in grids)
    return graph.correlation_loss(here, there) if temperature is None else graph.softmax_loss(here, there, temperature)


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
        self.temperature = None if settings.form == "pearson" else settings.temperature

    def __call__(self, batch: Batch) -> Tensor:
        stages = zip(self.teacher_grids, self.student_grids, strict=True)
        pairs = [
            (batch.student.grids[matching.tap_name(s)], batch.teacher.grids[matching.tap_name(t)]) for t, s in stages
        ]
        return torch.stack([position_loss(*pair, self.temperature) for pair in pairs]).mean()
