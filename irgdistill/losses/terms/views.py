"""Terms on two views of each image: VRM (Zhang et al., ICCV 2025) and CRLD (Zhang et al., ACM MM 2024).

A batch holds all first views and then all second ones, in the same order: b images and K classes in this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill.config import Positive, Probability, Weight
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Term, TermContext, TermSettings, term

if TYPE_CHECKING:
    import torch.nn.functional as F
    from torch import Tensor

    from irgdistill import graph
else:
    F, graph = lazy("torch.nn.functional"), lazy("irgdistill.graph")


def directions(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m, D): the unit vector from each of `b` to each of `a`; zero where they are equal."""
    return graph.unit(a[:, None] - b)


def edge_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """(…, D) -> (…): Huber loss of the difference, twice its sum over D: the squared norm where no number exceeds 1."""
    return 2 * F.smooth_l1_loss(student, teacher, reduction="none").sum(-1)


@term("vrm", weight=8.0, compares=("logits", "views"), all_logits=True, source="Zhang et al. 2025", place=20)
class VirtualRelations(Term):
    """Edges between the first views and the second, as directions between logits, of images and of classes.

    E_ij is the direction from the logits of the second view of image j to those of the first of image i, mean of
    `edge_distance` over all pairs; likewise between classes, each a vector over the images. Those of images count where
    the teacher's largest probability reaches `confidence` in both views; the paper leaves out those on which the two
    networks disagree most. Its weights are not published: 8 and 1.25 pull like soft targets. The batch is that of all
    processes; memory grows with its square, and with the square of the number of classes.
    """

    class Settings(TermSettings):
        classes: Weight = 1.25
        """Factor of the edges between classes; 0 saves their K² vectors."""
        confidence: Probability = 0.5
        """The teacher's probability from which on an image has edges."""

    def __init__(self, settings: Settings, context: TermContext) -> None:
        self.settings, self.world = settings, context.world

    def __call__(self, batch: Batch) -> Tensor:
        (s, s2), (t, t2) = (graph.widen(x.logits).chunk(2) for x in (batch.student, batch.teacher))
        s2, t2 = self.world.gather(s2), self.world.gather(t2).to(s2.dtype)
        sure, sure2 = (x.softmax(1).amax(1) >= self.settings.confidence for x in (t, t2))
        edges = edge_distance(directions(s, s2), directions(t.to(s.dtype), t2))
        loss: Tensor = (edges * (sure[:, None] & sure2)).mean()
        if self.settings.classes:
            s, t = self.world.gather(s), self.world.gather(t).to(s.dtype)
            loss = loss + self.settings.classes * edge_distance(directions(s.T, s2.T), directions(t.T, t2.T)).mean()
        return loss


@term("crld", weight=2.0, compares=("logits", "views"), source="Zhang et al. 2024", place=21)
class CrossViewTargets(Term):
    """Soft targets of each view, and of the other view, from views of which the teacher is sure.

    The KL within the views, for images whose first view has a probability of `confidence`; `cross` times the KL
    across, for those whose second has `confidence_across`: means over the images and both directions. Weight 2 and
    cross 0.25 are the authors' 2 and 0.5 beside a cross-entropy of 1 for each view; here it is the mean of both.
    """

    class Settings(TermSettings):
        temperature: Positive = 4.0
        """Divisor of the logits in both softmaxes; the term is multiplied by its square."""
        cross: Weight = 0.25
        """Factor of the divergences across views."""
        confidence: Probability = 0.9
        """The teacher's largest probability for the first view from which on views teach themselves."""
        confidence_across: Probability = 0.2
        """That for the second view from which on views teach each other."""

    def __init__(self, settings: Settings, context: TermContext) -> None:
        self.settings = settings

    def __call__(self, batch: Batch) -> Tensor:
        settings = self.settings
        (s, s2), (t, t2) = (graph.widen(x.logits).chunk(2) for x in (batch.student, batch.teacher))
        sure, sure_across = t.softmax(1).amax(1), t2.softmax(1).amax(1)
        within = (self._divergence(s, t) + self._divergence(s2, t2)) * (sure >= settings.confidence)
        across = (self._divergence(s2, t) + self._divergence(s, t2)) * (sure_across >= settings.confidence_across)
        loss: Tensor = (within + settings.cross * across).mean() / 2
        return loss

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(b, K) -> (b,): T² KL of the softmaxes at temperature T."""
        temperature = self.settings.temperature
        log_q, log_p = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
        divergences: Tensor = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
        return divergences
