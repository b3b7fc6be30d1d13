"""Loss terms and their weighted sum: objective = Σ weight × raw mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from irgdistill.config import STAGE_KINDS, TERMS, Fade, Kind, LossesConfig
from irgdistill.errors import UserError
from irgdistill.losses.base import Batch, Counterpart, Skip, Term, TermContext
from irgdistill.losses.several import TAPPED, MeanOverTeachers
from irgdistill.matching import Plan, Tap, Tapped
from irgdistill.runtime import World

PER_TEACHER = frozenset(("embedding", *STAGE_KINDS))
"""Kinds that each of several teachers has of its own."""


class StepLosses(NamedTuple):
    """The losses of one batch."""

    total: Tensor
    """The objective: the weighted sum of `raw`."""
    raw: dict[str, Tensor]
    """Term -> its unweighted mean, a scalar."""
    weights: dict[str, float]
    """Term -> its weight at this point of the training."""


class DistillLoss:
    """The weighted sum of terms. Raw values are kept apart from what is summed."""

    def __init__(
        self,
        terms: dict[str, Term],
        weights: Mapping[str, float],
        fades: Mapping[str, Fade],
        notes: Sequence[str] = (),
        trains_classifier: bool = True,
        rises: Mapping[str, Fade] | None = None,
    ) -> None:
        self.terms = terms
        self.fades, self.rises = fades, rises or {}
        self.notes = notes
        """A sentence for each term that was skipped, and one if nothing trains the classifier."""
        self.trains_classifier = trains_classifier
        """Whether any term reaches the student's output; otherwise its last layers keep their initial weights."""
        self._weights = {name: weights[name] for name in terms}
        self._raw: Callable[[Batch, Iterable[str] | None], dict[str, Tensor]] = self

    def weights(self, progress: float = 0.0) -> dict[str, float]:
        """Weight of every term at `progress`, the share of the training that is done, 0 to 1.

        Faded terms are skipped, except those that train something: DDP expects a gradient from them, if one of zeros.
        """
        weights = {}
        for name, weight in self._weights.items():
            first, last = self.fades.get(name, (math.inf, math.inf))
            left = 1.0 if progress < first else max(last - progress, 0) / max(last - first, 1e-9)
            start, end = self.rises.get(name, (0.0, 0.0))
            risen = 1.0 if progress >= end else max(progress - start, 0) / max(end - start, 1e-9)
            if left > 0 or self.terms[name].adapter is not None:
                weights[name] = weight * risen * left
        return weights

    def losses(self, batch: Batch, progress: float = 0.0) -> StepLosses:
        """Total, raw values and weights at `progress`, the share of the training that is done, 0 to 1."""
        weights = self.weights(progress)
        raw = self._raw(batch, tuple(weights))
        return StepLosses(self.total(raw, weights), raw, weights)

    def compile(self) -> None:
        """Run the terms through `torch.compile`.

        Not for several processes, whose terms communicate. It records no CUDA graphs: their outputs would not outlive
        the next step.
        """
        self._raw = torch.compile(self)

    def __call__(self, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Raw value of every term, or of those in `names`, a scalar each."""
        return {name: self.terms[name](batch) for name in names or self.terms}

    def total(self, raw: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
        """The objective, with the weights that `weights` returned."""
        zero = next(iter(raw.values())).new_zeros(())
        return sum((weights[name] * value for name, value in raw.items()), start=zero)

    def where(self, role: Literal["teacher", "student"], number: int = 0) -> dict[str, list[Tap]]:
        """The `taps`, `maps`, `energies` and `grids` of `Tapped` that the terms need of one network.

        `number`: which of several teachers.
        """
        terms: Iterable[Term | None] = self.terms.values()
        if role == "teacher":
            terms = [term.of_teacher(number) for term in self.terms.values()]
        known = [term for term in terms if term is not None]
        return {
            kind: list(dict.fromkeys(tap for term in known for tap in getattr(term, f"{role}_{kind}")))
            for kind in TAPPED
        }

    @property
    def compares_embeddings(self) -> bool:
        """Whether any term compares embeddings."""
        return any("embedding" in TERMS[name].compares for name in self.terms if name in TERMS)

    def adapters(self) -> nn.ModuleDict:
        """Networks that are trained beside the student, by term."""
        return nn.ModuleDict({name: term.adapter for name, term in self.terms.items() if term.adapter is not None})


def build_loss(
    config: LossesConfig,
    plan: Plan | None,
    world: World | None = None,
    booster: Tapped | None = None,
    labels: bool = True,
    class_weights: Tensor | None = None,
    embedding_widths: tuple[int, int] | None = None,
    classifier: bool = True,
    labelled_share: float = 1.0,
    weight: float = 1.0,
    others: Sequence[Counterpart] = (),
) -> DistillLoss:
    """The terms with a weight; with `labels` also those that compare the labels alone, whatever their weight.

    Relations span the images of all processes of `world`. `booster` is the network that is trained beside the student;
    `class_weights` (K,) weigh the labels, which the share `labelled_share` of the training images has;
    `embedding_widths` are the student's and the teacher's; `classifier`: the student has one. With `others`, teachers
    beside the first, whose share is `weight`, terms on stages and embeddings are means over the teachers. A term that
    does not apply to these networks is skipped, see `DistillLoss.notes`. Raises UserError if a term finds no stage that
    it could compare.
    """
    weights, notes, terms = config.weights(), list[str](), dict[str, Term]()
    kinds = {name: config.compares(name) for name in weights}
    weighted = {name: kinds[name] for name, weight in weights.items() if weight > 0}
    context = TermContext(
        losses=config,
        world=world or World(),
        matched=plan,
        booster_network=booster,
        class_weights=class_weights,
        embedding_widths=embedding_widths,
        labelled_share=labelled_share,
        others=weighted,
    )
    contexts = [context]
    contexts += [replace(context, matched=it.matched, embedding_widths=it.embedding_widths) for it in others]
    for name in kinds:
        if not (labels if kinds[name] == {"labels"} else name in weighted):
            continue
        built = _build_term(name, kinds[name], contexts, (weight, *(it.weight for it in others)), notes)
        if built is None:
            continue
        terms[name] = built
        for companion, beside in terms[name].companions.items():
            terms[companion], weights[companion] = beside, 1.0
    last = {"logits", "booster"} if classifier else {"embedding"}
    trained = labels or any(kinds[name] & last for name in terms if name in kinds)
    if classifier and not trained:
        notes.append("no term on logits: the classifier keeps its initial weights, only relations are learned")
    return DistillLoss(terms, weights, config.fades(), notes, trained, config.rises())


def _build_term(
    name: str, kinds: frozenset[Kind], contexts: Sequence[TermContext], weights: Sequence[float], notes: list[str]
) -> Term | None:
    """The term, of all teachers if they have what it compares; None, and a reason in `notes`, if none allows it."""
    terms, several = dict[int, Term](), len(contexts) > 1 and bool(kinds & PER_TEACHER)
    for number, context in enumerate(contexts if several else contexts[:1]):
        which = f"teacher {number + 1}: " if several else ""
        try:
            terms[number] = TERMS[name].cls(getattr(context.losses, name), context)
        except Skip as reason:
            notes.append(f"{which}{reason}")
        except UserError as error:
            raise UserError(f"{which}{error}") from None
    return MeanOverTeachers(name, terms, weights) if several and terms else terms.get(0)


def compared_maps(config: LossesConfig, plan: Plan) -> list[Tap]:
    """The teacher's taps whose whole maps the terms compare. Raises UserError if a term finds none."""
    context = TermContext(config, World(), plan)
    terms = [TERMS[name].cls(getattr(config, name), context) for name in config.comparing("maps")]
    return list(dict.fromkeys(tap for term in terms for tap in term.teacher_maps))


def gradient_shares(
    raw: dict[str, Tensor], weights: dict[str, float], parameters: list[nn.Parameter], world: World
) -> dict[str, float]:
    """Share of each weighted term in the sum of the norms of their gradients; keeps the graph for the real backward."""
    norms = {}
    for name, value in raw.items():
        grads: tuple[Tensor | None, ...] = ()
        if weights[name] > 0 and value.requires_grad:
            grads = torch.autograd.grad(weights[name] * value, parameters, retain_graph=True, allow_unused=True)
        norms[name] = float(sum(world.mean(grad.double()).square().sum() for grad in grads if grad is not None)) ** 0.5
    total = sum(norms.values())
    return {name: norm / total if total > 0 else 0.0 for name, norm in norms.items()}
