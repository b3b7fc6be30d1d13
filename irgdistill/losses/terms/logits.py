"""Terms on logits: cross-entropy, soft targets, regression, decoupled targets. All are means over the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import model_validator

from irgdistill.config import METHOD, Fade, Flag, Positive, Probability, Section, Share, Weight
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Term, TermContext, TermSettings, term

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from timm import loss
    from torch import Tensor, nn

    from irgdistill import graph
else:
    torch, F, graph, loss = map(lazy, ("torch", "torch.nn.functional", "irgdistill.graph", "timm.loss"))


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over images; both (B, K). Hinton et al. 2015, section 2."""
    log_p = F.log_softmax(graph.widen(teacher) / temperature, dim=1)
    log_q = F.log_softmax(graph.widen(student) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def standardized(logits: Tensor) -> Tensor:
    """(B, K): each image's logits minus their mean, over their standard deviation. Sun et al., CVPR 2024.

    The deviation is torch's (K - 1 in the denominator) plus 1e-7, as in the authors' code.
    """
    z = graph.widen(logits)
    deviation, mean = torch.std_mean(z, dim=1, keepdim=True)
    return (z - mean) / (deviation + 1e-7)


def logit_regression(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over (B, K). Ba & Caruana 2014; the vertex part of L_IRG."""
    return F.mse_loss(graph.widen(student), graph.widen(teacher))


def decoupled_targets(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0, beta: float = 2.0
) -> Tensor:
    """T²·(TCKD + beta·NCKD), mean over images; logits (B, K), labels (B,). Zhao et al. 2022, equation 7, alpha 1.

    TCKD is the divergence of (target, all others) as two classes, NCKD that among the other classes alone.
    """
    target, place = labels[:, None], torch.arange(student.shape[1] - 1, device=labels.device)
    rest = place + (place >= target)
    parts = []
    for logits in (graph.widen(teacher), graph.widen(student)):
        log = F.log_softmax(logits / temperature, dim=1)
        binary = torch.cat([log.gather(1, target), log.gather(1, rest).logsumexp(1, keepdim=True)], dim=1)
        parts.append((binary, F.log_softmax(logits.gather(1, rest) / temperature, dim=1)))
    (teacher_binary, teacher_others), (student_binary, student_others) = parts
    tckd = F.kl_div(student_binary, teacher_binary, reduction="batchmean", log_target=True)
    nckd = F.kl_div(student_others, teacher_others, reduction="batchmean", log_target=True)
    return temperature**2 * (tckd + beta * nckd)


@term("ce", compares="labels", place=0)
class CrossEntropy(Term):
    """Cross-entropy with the labels: class indices (B,) or mixed probabilities (B, K).

    The kind `binary` is timm's `BinaryCrossEntropy`: each class against the others, a mean over images and classes
    (Wightman et al. 2021, "ResNet strikes back", section 3).

    With class weights (K,), each image's loss is multiplied by the weight of its class and the mean is taken over the
    images: torch's own weighted mean would depend on how a batch is split among processes. For the same reason, if only
    a share of the images has labels, the sum over these is divided by that share of the batch.
    """

    class Settings(Section):
        weight: Weight = 1.0
        """Factor of its mean."""
        label_smoothing: Annotated[
            Probability, Flag("--label-smoothing", METHOD, "Label smoothing.", metavar="SHARE")
        ] = 0.0
        """Share of each target that is spread evenly over the classes."""
        kind: Literal["softmax", "binary"] = "softmax"
        """`binary`: the binary cross-entropy of each class, as in timm's recipes with mixup. Its gradient is about K
        times smaller for K classes: AdamW does not mind, SGD needs a larger `weight`."""
        target_threshold: Share | None = None
        """With `binary`: mixed labels with a larger share become 1 and the others 0, such as 0.2; default: they stay
        shares."""
        class_weights: Literal["balanced", "none"] | tuple[Weight, ...] = "none"
        """Weights of the classes: `balanced` (inverse frequency, mean 1 over the training images), or one each."""

        @model_validator(mode="after")
        def _check_threshold(self) -> CrossEntropy.Settings:
            if self.target_threshold is not None and self.kind != "binary":
                raise ValueError("target_threshold is for kind = binary")
            return self

    def __init__(self, settings: Settings, context: TermContext) -> None:
        self.label_smoothing, self.class_weights = settings.label_smoothing, context.class_weights
        self.labelled_share = context.labelled_share
        self.binary: nn.Module | None = None
        if settings.kind == "binary":
            self.binary = loss.BinaryCrossEntropy(
                smoothing=0.0, target_threshold=settings.target_threshold, reduction="none"
            )

    def __call__(self, batch: Batch) -> Tensor:
        logits, targets = graph.widen(batch.student.logits), batch.targets
        if self.labelled_share < 1:
            return (self.each(logits, targets.clamp(min=0)) * (targets >= 0)).mean() / self.labelled_share
        if self.binary is None and self.class_weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return self.each(logits, targets).mean()

    def each(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each image (B,)."""
        weights, smoothing = self.class_weights, self.label_smoothing
        weights = None if weights is None else weights.to(logits)
        if self.binary is None:
            return F.cross_entropy(logits, targets, weights, reduction="none", label_smoothing=smoothing)
        classes = logits.shape[1]
        shares = F.one_hot(targets, classes).to(logits) if targets.ndim == 1 else targets.to(logits)
        losses: Tensor = self.binary(logits, shares * (1 - smoothing) + smoothing / classes).mean(1)
        return losses if weights is None else losses * (shares @ weights)


@term("kd", compares="logits", source="Hinton et al. 2015", place=1)
class SoftTargets(Term):
    """Soft targets (Hinton et al. 2015)."""

    class Settings(TermSettings):
        weight: Annotated[
            Weight | None, Flag("--kd-weight", METHOD, "Weight of the soft targets.", metavar="WEIGHT")
        ] = None
        """Factor of this term's mean; default: the method's."""
        temperature: Annotated[
            Positive, Flag("--temperature", METHOD, "Temperature of the soft targets.", metavar="T")
        ] = 4.0
        """Divisor of the logits in both softmaxes; the term is multiplied by its square."""
        standardize: bool = False
        """Subtract from each image's logits their mean and divide by their standard deviation first (Sun et al. 2024,
        whose CIFAR runs have temperature 2, weight 9 and `losses.ce.weight` 0.1)."""

        @property
        def all_logits(self) -> bool:
            return self.standardize

    def __init__(self, settings: Settings, context: TermContext) -> None:
        self.temperature, self.prepared = settings.temperature, _preparation(settings.standardize)

    def __call__(self, batch: Batch) -> Tensor:
        student, teacher = self.prepared(batch.student.logits), self.prepared(batch.teacher.logits)
        return soft_targets(student, teacher, self.temperature)


def _preparation(standardize: bool) -> Callable[[Tensor], Tensor]:
    return standardized if standardize else graph.widen


@term("logits", weight=0.5, compares="logits", all_logits=True, source="Ba & Caruana 2014", place=2)
class LogitRegression(Term):
    """Mean squared error of the logits: the vertex part of IRG.

    Weight 0.5: half of the mean is the limit of soft targets of weight 1 at a high temperature (Hinton et al. 2015,
    equation 4).
    """

    class Settings(TermSettings):
        weight: Annotated[
            Weight | None, Flag("--logits-weight", METHOD, "Weight of the logit regression.", metavar="WEIGHT")
        ] = None
        """Factor of this term's mean; default: the method's."""

    def __call__(self, batch: Batch) -> Tensor:
        return logit_regression(batch.student.logits, batch.teacher.logits)


@term("dkd", weight=1.0, compares=("logits", "labels"), source="Zhao et al. 2022", place=6)
class DecoupledTargets(Term):
    """Decoupled targets (Zhao et al. 2022).

    The target of a mixed image is the class with the largest share. Weight 1 is the paper's alpha; beta 2 is the
    authors' for ResNet-56 -> ResNet-20 (up to 8 for wider networks).
    """

    class Settings(TermSettings):
        temperature: Positive | None = None
        """Divisor of the logits in both softmaxes; default: that of `kd`."""
        beta: Weight = 2.0
        """Factor of the divergence among the other classes, beside that of the target; the authors' for CIFAR
        ResNets."""
        rise: Fade | None = None
        """Shares of the training between which the weight rises from 0; the authors' are `[0, 0.0833]`, 20 of 240
        epochs. Default: none."""
        standardize: bool = False
        """As `losses.kd.standardize`; both weights are then 9 to 18 times as large in the paper's runs."""

        @property
        def all_logits(self) -> bool:
            return self.standardize

    def __init__(self, settings: Settings, context: TermContext) -> None:
        self.temperature, self.beta = settings.temperature or context.losses.kd.temperature, settings.beta
        self.prepared = _preparation(settings.standardize)

    def __call__(self, batch: Batch) -> Tensor:
        labels = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
        student, teacher = self.prepared(batch.student.logits), self.prepared(batch.teacher.logits)
        return decoupled_targets(student, teacher, labels, self.temperature, self.beta)
