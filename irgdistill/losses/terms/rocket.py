"""Rocket launching (Zhou et al. 2018): a larger network, the booster, is trained from scratch beside the student.

Two of the paper's three parts are here: both networks learn from the labels, and the student also from the booster's
logits, whose gradient stops there. The third, lower layers that both share, needs networks made for it. The booster has
the teacher's architecture and none of its weights, its optimizer settings are the student's, and it is not evaluated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Term, TermContext, TermSettings, term

if TYPE_CHECKING:
    import torch.nn.functional as F
    from torch import Tensor

    from irgdistill import graph
    from irgdistill.losses import adapters
else:
    F, graph, adapters = lazy("torch.nn.functional"), lazy("irgdistill.graph"), lazy("irgdistill.losses.adapters")


def rocket_hint(student: Tensor, booster: Tensor) -> Tensor:
    """Mean squared error over (B, K) against the booster's logits as constants. Zhou et al. 2018, equation 2."""
    return F.mse_loss(graph.widen(student), graph.widen(booster.detach()))


@term("rocket", weight=0.3, compares=("booster", "labels"), source="Zhou et al. 2018", place=10)
class Rocket(Term):
    """Logits of a network like the teacher that is trained from scratch beside the student (Zhou et al. 2018).

    Weight 0.3: the authors' 0.03 on the sum over classes is 0.03·K of the mean, here for K = 10.
    """

    def __init__(self, settings: TermSettings, context: TermContext) -> None:
        self.adapter = adapters.Booster(context.booster)
        self.companions = {"booster": BoosterLabels(context.losses.ce, context)}

    def __call__(self, batch: Batch) -> Tensor:
        return rocket_hint(batch.student.logits, batch.student.adapted["rocket"]["logits"])


class BoosterLabels(Term):
    """The booster's own cross-entropy; none of its gradient reaches the student."""

    def __call__(self, batch: Batch) -> Tensor:
        logits = graph.widen(batch.student.adapted["rocket"]["logits"])
        return F.cross_entropy(logits, batch.targets, label_smoothing=self.settings.label_smoothing)
