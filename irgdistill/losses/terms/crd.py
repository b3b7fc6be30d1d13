"""Contrastive representation distillation (Tian et al., ICLR 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill import matching
from irgdistill.config import Count, Positive
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, TermContext, TermSettings, term
from irgdistill.losses.terms.similarity import PooledLastStage

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from irgdistill import graph
    from irgdistill.losses import adapters
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")
    graph, adapters = lazy("irgdistill.graph"), lazy("irgdistill.losses.adapters")


def contrast(anchors: Tensor, positives: Tensor, negatives: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """-log h(positive) - Σ log(1 - h(negative)), mean over the anchors; h = r / (r + N), N negatives of the anchor.

    Unit vectors (B, D), (B, D) and (M, D); `allowed` (B, M): which are negatives of which anchor. r is the
    exponential of cosine / T over its mean among the anchor's negatives, a constant in the backward pass. An anchor
    without negatives counts as zero. Tian et al. 2020, section 3.2; the authors' code keeps the mean of the first
    batch.
    """
    count = allowed.sum(1)
    exponents = anchors @ negatives.T / temperature
    shift = exponents.detach().masked_fill(~allowed, -torch.inf).logsumexp(1) - count.log()
    shift = shift.masked_fill(count == 0, 0)
    positive = (anchors * positives).sum(1) / temperature - shift
    log_count = count.clamp(min=1).log()
    # log h = -softplus(log N - log r), log(1 - h) = -softplus(log r - log N)
    others = F.softplus(exponents - (shift + log_count)[:, None]).masked_fill(~allowed, 0).sum(1)
    losses: Tensor = (F.softplus(log_count - positive) + others).masked_fill(count == 0, 0)
    return losses.mean()


@term("crd", weight=0.8, compares=("features", "labels"), source="Tian et al. 2020", place=19)
class Contrastive(PooledLastStage):
    """The student's embedding of an image against those of other classes, and the teacher's likewise.

    `contrast` both ways, between linear embeddings of both networks' pooled features, trained with the student; either
    way one of the two is a constant. Negatives are the latest embeddings of images of other classes, of all processes,
    where the authors keep one of every image, averaged over epochs. Weight 0.8, 16,384 negatives, temperature 0.07 and
    128 numbers are theirs.
    """

    class Settings(TermSettings):
        negatives: Count = 16384
        """Embeddings that are kept to contrast with; those of an image's own class are left out."""
        temperature: Positive = 0.07
        """Divisor of the cosines."""
        width: Count = 128
        """Numbers of an embedding."""

    def __init__(self, settings: Settings, context: TermContext) -> None:
        super().__init__(settings, context)
        self.embeddings = adapters.Contrast(self.student, self.teacher, settings.width, settings.negatives)
        self.adapter = self.embeddings

    def __call__(self, batch: Batch) -> Tensor:
        queue, temperature = self.embeddings.queue, self.settings.temperature
        student = graph.unit(graph.widen(batch.student.adapted["crd"]["embedding"]))
        teacher = graph.unit(self.embeddings.teacher(batch.teacher.features[matching.tap_name(self.teacher)]))
        labels = batch.targets if batch.targets.ndim == 1 else batch.targets.argmax(1)
        kept = {name: queue.get_buffer(name).clone() for name in ("student", "teacher", "labels")}  # changed below
        allowed = (kept["labels"] != labels[:, None]) & (kept["labels"] >= 0)
        loss = contrast(student, teacher.detach(), kept["teacher"], allowed, temperature)
        loss = loss + contrast(teacher, student.detach(), kept["student"], allowed, temperature)
        gather = self.world.gather
        queue.add(student=gather(student.detach()), teacher=gather(teacher.detach()), labels=gather(labels))
        return loss
