"""Terms on logits: cross-entropy, soft targets, regression, decoupled targets. All are means over the images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from irgdistill.graph import widen
from irgdistill.losses.term import Batch, Term


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over images; both (B, K). Hinton et al. 2015, section 2."""
    log_p = F.log_softmax(widen(teacher) / temperature, dim=1)
    log_q = F.log_softmax(widen(student) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def logit_regression(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over (B, K). Ba & Caruana 2014; the vertex part of L_IRG."""
    return F.mse_loss(widen(student), widen(teacher))


def decoupled_targets(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0, beta: float = 2.0
) -> Tensor:
    """T²·(TCKD + beta·NCKD), mean over images; logits (B, K), labels (B,). Zhao et al. 2022, equation 7, alpha 1.

    TCKD is the divergence of (target, all others) as two classes, NCKD that among the other classes alone. The authors
    raise the weight over the first 20 epochs; here it is constant.
    """
    target, place = labels[:, None], torch.arange(student.shape[1] - 1, device=labels.device)
    rest = place + (place >= target)
    parts = []
    for logits in (widen(teacher), widen(student)):
        log = F.log_softmax(logits / temperature, dim=1)
        binary = torch.cat([log.gather(1, target), log.gather(1, rest).logsumexp(1, keepdim=True)], dim=1)
        parts.append((binary, F.log_softmax(logits.gather(1, rest) / temperature, dim=1)))
    (teacher_binary, teacher_others), (student_binary, student_others) = parts
    tckd = F.kl_div(student_binary, teacher_binary, reduction="batchmean", log_target=True)
    nckd = F.kl_div(student_others, teacher_others, reduction="batchmean", log_target=True)
    return temperature**2 * (tckd + beta * nckd)


class CrossEntropy(Term):
    """Cross-entropy with class indices (B,) or mixed probabilities (B, K).

    With `class_weights` (K,) each image's is multiplied by its class's, and the mean is over the images still: torch's
    own weighted mean would depend on how a batch is shared among processes.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def __call__(self, batch: Batch) -> Tensor:
        logits, smoothing = widen(batch.student.logits), self.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, batch.targets, label_smoothing=smoothing)
        weights = self.class_weights.to(logits)
        return F.cross_entropy(logits, batch.targets, weights, reduction="none", label_smoothing=smoothing).mean()


class SoftTargets(Term):
    """`soft_targets` between the two networks' logits."""

    def __init__(self, temperature: float = 4.0) -> None:
        self.temperature = temperature

    def __call__(self, batch: Batch) -> Tensor:
        return soft_targets(batch.student.logits, batch.teacher.logits, self.temperature)


class LogitRegression(Term):
    """`logit_regression` between the two networks' logits."""

    def __call__(self, batch: Batch) -> Tensor:
        return logit_regression(batch.student.logits, batch.teacher.logits)


class DecoupledTargets(Term):
    """`decoupled_targets`; of mixed images the class with the largest share is the target.

    Weight 1 is the paper's alpha; beta 2 the authors' for ResNet-56 -> ResNet-20 (up to 8 for wider networks).
    """

    def __init__(self, temperature: float = 4.0, beta: float = 2.0) -> None:
        self.temperature, self.beta = temperature, beta

    def __call__(self, batch: Batch) -> Tensor:
        labels = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
        return decoupled_targets(batch.student.logits, batch.teacher.logits, labels, self.temperature, self.beta)
