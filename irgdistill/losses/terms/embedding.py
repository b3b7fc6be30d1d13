"""A term on embeddings, for teachers whose classes are not the data's: cosines, or similarities to a queue.

The batch is that of all processes of `world` (see `relations`). B images, b of them here, D the teacher's width, Q the
length of the queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from irgdistill.config import Count, Positive
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Term, TermContext, TermSettings, term

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from irgdistill import graph
    from irgdistill.losses import adapters
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")
    graph, adapters = lazy("irgdistill.graph"), lazy("irgdistill.losses.adapters")

EVERY = slice(None)


def centred_cosine(student: Tensor, teacher: Tensor, rows: slice = EVERY) -> Tensor:
    """1 - cosine of two embeddings (B, D), each minus its mean over the batch; mean over `rows`.

    Half the squared distance of unit vectors (Navaneet et al., BMVC 2021, equation 1); the centring is ours: pooled
    features after a ReLU share a large mean, which alone makes every cosine nearly 1.
    """
    own, other = (graph.unit(x - x.mean(0)) for x in (graph.widen(student), graph.widen(teacher)))
    return 1 - (own[rows] * other[rows]).sum(1).mean()


def queue_similarity(
    student: Tensor, teacher: Tensor, anchors: Tensor, valid: Tensor, temperature: float = 0.07
) -> Tensor:
    """KL of the similarities to anchors, mean over images. Fang et al., ICLR 2021 (SEED), equations 2 to 4.

    Embeddings (b, D); `anchors` (Q, D) are embeddings of the teacher, of which those with `valid` (Q,) count. Their
    mean is subtracted from everything (ours); similarities are cosines over `temperature`, the same for both networks.
    """
    anchors, share = graph.widen(anchors), valid.to(graph.widen(anchors).dtype)[:, None]
    mean = (anchors * share).sum(0) / share.sum()
    directions = graph.unit(anchors - mean)
    similarities = (graph.unit(graph.widen(x) - mean) @ directions.T / temperature for x in (student, teacher))
    log_q, log_p = (F.log_softmax(x.masked_fill(~valid, float("-inf")), 1).masked_fill(~valid, 0) for x in similarities)
    return (log_p.exp() * share.T * (log_p - log_q)).sum(1).mean()


@term("embedding", compares="embedding", weight=10.0, source="Navaneet et al. 2021", place=30)
class Embedding(Term):
    """The student's embedding through a linear projector against the teacher's (Navaneet et al. 2021).

    The projector is trained beside the student and is no part of it. `cosine` is `centred_cosine`; `queue` is
    `queue_similarity` to the teacher's latest embeddings, those of this batch among them (Fang et al. 2021).
    """

    class Settings(TermSettings):
        form: Literal["cosine", "queue"] = "cosine"
        """`cosine` of centred embeddings; `queue`: similarities to a queue of the teacher's embeddings."""
        queue: Count = 4096
        """Embeddings in the queue; at least the batch."""
        temperature: Positive = 0.07
        """Divisor of the cosines to the queue."""

    def __init__(self, settings: Settings, context: TermContext) -> None:
        self.world, self.temperature = context.world, settings.temperature
        self.projector = adapters.Projector(*context.widths, settings.queue if settings.form == "queue" else 0)
        self.adapter = self.projector

    def __call__(self, batch: Batch) -> Tensor:
        student, teacher = batch.student.adapted["embedding"]["projected"], batch.teacher.embedding
        assert teacher is not None
        everyone, rows = self.world.gather(teacher), self.world.rows(len(student))
        if self.projector.queue is None:
            return centred_cosine(self.world.gather(student), everyone, rows)
        queue = self.projector.queue
        queue.add(teacher=everyone, filled=everyone.new_ones(len(everyone), dtype=torch.bool))
        anchors, filled = (queue.get_buffer(name).clone() for name in ("teacher", "filled"))  # changed in the next step
        return queue_similarity(student, everyone[rows], anchors, filled, self.temperature)
