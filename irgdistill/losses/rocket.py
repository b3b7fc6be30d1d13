"""Rocket launching (Zhou et al. 2018): a larger network, the booster, is trained from scratch beside the student.

Of the paper's three parts there are two: both learn from the labels, and the student also from the booster's logits,
whose gradient stops there. The third, lower layers that both share, needs networks made for it. The booster has the
teacher's architecture and none of its weights, its optimizer settings are the student's, and it is not evaluated.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from irgdistill.graph import widen
from irgdistill.losses.logits import logit_regression
from irgdistill.losses.term import Batch, Term
from irgdistill.matching import Output, Tapped


def rocket_hint(student: Tensor, booster: Tensor) -> Tensor:
    """Mean squared error over (B, K) against the booster's logits as constants. Zhou et al. 2018, equation 2."""
    return logit_regression(student, booster.detach())


class Booster(nn.Module):
    """The booster as the adapter of `Rocket`."""

    def __init__(self, network: Tapped) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, output: Output) -> dict[str, Tensor]:
        return {"logits": self.network(images).logits}


class Rocket(Term):
    """`rocket_hint`. Weight 0.3: the authors' 0.03 on the sum over classes is 0.03·K of the mean, here for K = 10."""

    def __init__(self, booster: Tapped) -> None:
        self.adapter = Booster(booster)

    def __call__(self, batch: Batch) -> Tensor:
        return rocket_hint(batch.student.logits, batch.student.adapted["rocket"]["logits"])


class BoosterLabels(Term):
    """The booster's own cross-entropy; none of its gradient reaches the student."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, batch: Batch) -> Tensor:
        logits = widen(batch.student.adapted["rocket"]["logits"])
        return F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing)
