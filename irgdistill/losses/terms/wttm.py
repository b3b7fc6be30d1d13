"""Transformed teacher matching (Zheng & Yang, ICLR 2024): a temperature for the teacher alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill.config import Positive
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Term, TermContext, TermSettings, term

if TYPE_CHECKING:
    import torch.nn.functional as F
    from torch import Tensor

    from irgdistill import graph
else:
    F, graph = lazy("torch.nn.functional"), lazy("irgdistill.graph")


def transformed_targets(student: Tensor, teacher: Tensor, gamma: float, weighted: bool = True) -> Tensor:
    """KL(p^γ / Σ p^γ ‖ softmax(student)), mean over images, p = softmax(teacher); both (B, K).

    Transformed teacher matching; `weighted`: each image counts Σ_k p_k^γ times, which is larger for smoother
    predictions.
    """
    log_p = gamma * F.log_softmax(graph.widen(teacher), dim=1)
    log_q = F.log_softmax(graph.widen(student), dim=1)
    divergences = F.kl_div(log_q, log_p.log_softmax(1), reduction="none", log_target=True).sum(1)
    return (divergences * log_p.logsumexp(1).exp()).mean() if weighted else divergences.mean()


@term("wttm", weight=4.0, compares="logits", all_logits=True, source="Zheng & Yang 2024", place=16)
class TransformedTargets(Term):
    """Soft targets of the teacher's probabilities to a power, the student's as they are.

    `transformed_targets`. Weight 4 with gamma 0.2: of the authors' runs.
    """

    class Settings(TermSettings):
        gamma: Positive = 0.2
        """Power of the teacher's probabilities, the inverse of a temperature."""
        weighted: bool = True
        """Weigh each image by the sum of its powers; False: TTM, whose authors use gamma 0.1 and weight 45."""

    def __init__(self, settings: Settings, context: TermContext) -> None:
        self.gamma, self.weighted = settings.gamma, settings.weighted

    def __call__(self, batch: Batch) -> Tensor:
        return transformed_targets(batch.student.logits, batch.teacher.logits, self.gamma, self.weighted)
