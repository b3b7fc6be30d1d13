"""Loss terms and their weighted sum: objective = Σ weight × raw mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from irgdistill.config import Fade, LossesConfig
from irgdistill.losses.learner import Learner
from irgdistill.losses.logits import CrossEntropy, DecoupledTargets, LogitRegression, SoftTargets
from irgdistill.losses.maps import Attention, FlowMatrices, Hint, attended
from irgdistill.losses.relations import Edges, Transformations
from irgdistill.losses.rocket import BoosterLabels, Rocket
from irgdistill.losses.similarity import Probabilities, Relational, Similarity
from irgdistill.losses.term import Batch, Term
from irgdistill.matching import Plan, Tap, Tapped
from irgdistill.runtime import World

__all__ = ["Batch", "DistillLoss", "Learner", "Term", "build_loss", "gradient_shares"]


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

    def __init__(self, terms: dict[str, Term], weights: dict[str, float], fades: Mapping[str, Fade]) -> None:
        self.terms = terms
        self.fades = fades
        self._weights = {name: weights[name] for name in terms}
        self._raw: Callable[[Batch, Iterable[str] | None], dict[str, Tensor]] = self

    def weights(self, progress: float = 0.0) -> dict[str, float]:
        """Of every term, once `progress`, a share from 0 to 1, of the training is done.

        Faded terms are left out, but for those that train something: DDP expects a gradient, if one of zeros.
        """
        weights = {}
        for name, weight in self._weights.items():
            first, last = self.fades.get(name, (math.inf, math.inf))
            left = 1.0 if progress < first else max(last - progress, 0) / max(last - first, 1e-9)
            if left > 0 or self.terms[name].adapter is not None:
                weights[name] = weight * left
        return weights

    def losses(self, batch: Batch, progress: float = 0.0) -> StepLosses:
        """Total, raw values and weights once `progress`, a share from 0 to 1, of the training is done."""
        weights = self.weights(progress)
        raw = self._raw(batch, tuple(weights))
        return StepLosses(self.total(raw, weights), raw, weights)

    def compile(self) -> None:
        """Run the terms through `torch.compile`.

        Not for several processes, whose terms communicate, and without CUDA graphs, whose outputs do not outlive the
        next step.
        """
        self._raw = torch.compile(self)

    def __call__(self, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Raw value of every term, or of those named, a scalar each."""
        return {name: self.terms[name](batch) for name in names or self.terms}

    def total(self, raw: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
        """The objective, by what `weights` gave for now."""
        zero = next(iter(raw.values())).new_zeros(())
        return sum((weights[name] * value for name, value in raw.items()), start=zero)

    def where(self, role: Literal["teacher", "student"]) -> dict[str, list[Tap]]:
        """What the terms need of one network: `taps`, `maps` and `energies` of `Tapped`."""
        return {
            kind: list(dict.fromkeys(tap for term in self.terms.values() for tap in getattr(term, f"{role}_{kind}")))
            for kind in ("taps", "maps", "energies")
        }

    def adapters(self) -> nn.ModuleDict:
        """What is trained beside the student, by term."""
        return nn.ModuleDict({name: term.adapter for name, term in self.terms.items() if term.adapter is not None})


def build_loss(
    config: LossesConfig,
    plan: Plan | None,
    world: World | None = None,
    booster: Tapped | None = None,
    labels: bool = True,
    class_weights: Tensor | None = None,
) -> DistillLoss:
    """Cross-entropy and the terms with a weight.

    Transformations are left out where no stage of the plan has them, and beside relations so is attention.

    Relations span the images of all processes of `world`; `booster` is the network that `rocket` trains beside the
    student. Without `labels` there is no cross-entropy; with `class_weights` (K,) it is weighted. Raises UserError
    where a term finds no stage that it could compare.
    """
    weights = config.weights()
    on = {name for name, weight in weights.items() if weight > 0}
    terms: dict[str, Term] = {"ce": CrossEntropy(config.ce.label_smoothing, class_weights)} if labels else {}
    if "kd" in on:
        terms["kd"] = SoftTargets(config.kd.temperature)
    if "logits" in on:
        terms["logits"] = LogitRegression()
    if on & {"edges", "transform"}:
        assert plan is not None
        if "edges" in on:
            terms["edges"] = Edges(plan, config.edges.blocks, world)
        stages = [ends for pair in plan.pairs if (ends := pair.transformation()) is not None]
        if "transform" in on and stages:
            terms["transform"] = Transformations(stages, world)
    if "dkd" in on:
        terms["dkd"] = DecoupledTargets(config.dkd.temperature or config.kd.temperature, config.dkd.beta)
    if plan is not None:
        if on & {"edges", "transform"} and not attended(plan):
            on -= {"attention"}
        terms |= {name: build() for name, build in _of_stages(config, plan, world).items() if name in on}
    if "rocket" in on:
        assert booster is not None
        terms |= {"rocket": Rocket(booster), "booster": BoosterLabels(config.ce.label_smoothing)}
    return DistillLoss(terms, {**weights, "booster": 1.0}, config.fades())


def _of_stages(config: LossesConfig, plan: Plan, world: World | None) -> dict[str, Callable[[], Term]]:
    """How the other terms on matched stages are made."""
    return {
        "fitnet": lambda: Hint(plan),
        "at": lambda: Attention(plan, over_positions=True),
        "attention": lambda: Attention(plan, over_positions=False),
        "fsp": lambda: FlowMatrices(plan),
        "rkd": lambda: Relational(plan, config.rkd.angle, world),
        "sp": lambda: Similarity(plan, world),
        "pkt": lambda: Probabilities(plan, world),
    }


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
