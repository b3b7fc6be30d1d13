"""Terms on logits: cross-entropy, soft targets, regression. All are means: weights do not depend on the batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from irgdistill.graph import widen
from irgdistill.losses.term import Batch


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over images; both (B, K). Hinton et al. 2015, section 2."""
    log_p = F.log_softmax(widen(teacher) / temperature, dim=1)
    log_q = F.log_softmax(widen(student) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def logit_regression(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over (B, K). Ba & Caruana 2014; the vertex part of L_IRG."""
    return F.mse_loss(widen(student), widen(teacher))


class CrossEntropy:
    """Cross-entropy with class indices (B,) or mixed probabilities (B, K)."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, batch: Batch) -> Tensor:
        return F.cross_entropy(widen(batch.student.logits), batch.targets, label_smoothing=self.label_smoothing)


class SoftTargets:
    """`soft_targets` between the two networks' logits."""

    def __init__(self, temperature: float = 4.0) -> None:
        self.temperature = temperature

    def __call__(self, batch: Batch) -> Tensor:
        return soft_targets(batch.student.logits, batch.teacher.logits, self.temperature)


class LogitRegression:
    """`logit_regression` between the two networks' logits."""

    def __call__(self, batch: Batch) -> Tensor:
        return logit_regression(batch.student.logits, batch.teacher.logits)
