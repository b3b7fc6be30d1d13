"""Several teachers: their mean logits, and the mean of a term over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from irgdistill import graph
from irgdistill.losses.base import Batch, Term
from irgdistill.matching import Output

TAPPED = ("taps", "maps", "energies", "grids")


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Logits (B, K) of the weighted mean of the teachers' probabilities, from the logits (B, K) of each.

    Their softmax is Σ w·softmax(z) / Σ w; their logsumexp, which a softmax does not see, is the weighted mean of the
    teachers', so that equal logits are their own mean. Averaged predictions of an ensemble are the targets of Hinton et
    al. 2015, section 1; a temperature applies to the result.
    """
    stacked = torch.stack([graph.widen(z) for z in logits])
    shares = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)[:, None, None] / sum(weights)
    levels = stacked.logsumexp(2, keepdim=True)
    return (stacked - levels + shares.log()).logsumexp(0) + (shares * levels).sum(0)


def with_mean_logits(outputs: Sequence[Output], weights: Sequence[float], answers: Sequence[bool]) -> list[Output]:
    """The outputs of all teachers, each with the mean of the logits of those in `answers` (see `mean_logits`).

    Without any, each keeps its own.
    """
    own = [(output.logits, weight) for output, weight, known in zip(outputs, weights, answers, strict=True) if known]
    if len(outputs) == 1 or not own:
        return list(outputs)
    logits = own[0][0] if len(own) == 1 else mean_logits(*zip(*own, strict=True))
    return [output._replace(logits=logits) for output in outputs]


class PerTeacher(nn.ModuleDict):
    """The adapters of a term by the number of the teacher, with which the names of their tensors begin."""

    def forward(self, images: Tensor, output: Output) -> dict[str, Tensor]:
        results = {number: adapter(images, output) for number, adapter in self.items()}
        return {f"{number}.{name}": x for number, tensors in results.items() for name, x in tensors.items()}


class MeanOverTeachers(Term):
    """A term for each teacher, and the weighted mean of their values.

    `terms` by the teacher's number, for those that allow the term; `weights` of all teachers, of which those of `terms`
    are made to sum to 1.
    """

    def __init__(self, name: str, terms: Mapping[int, Term], weights: Sequence[float]) -> None:
        self.name, self.terms = name, terms
        total = sum(weights[number] for number in terms)
        self.shares = {number: weights[number] / total for number in terms}
        adapters = {str(number): term.adapter for number, term in terms.items() if term.adapter is not None}
        self.adapter = PerTeacher(adapters) if adapters else None
        for kind in TAPPED:
            taps = (tap for term in terms.values() for tap in getattr(term, f"student_{kind}"))
            setattr(self, f"student_{kind}", tuple(dict.fromkeys(taps)))

    def of_teacher(self, number: int) -> Term | None:
        return self.terms.get(number)

    def __call__(self, batch: Batch) -> Tensor:
        values = [share * self.terms[number](self._with(batch, number)) for number, share in self.shares.items()]
        return torch.stack(values).sum()

    def _with(self, batch: Batch, number: int) -> Batch:
        """The batch with one teacher alone, and what was adapted for it."""
        start = f"{number}."
        adapted = batch.student.adapted.get(self.name, {})
        own = {key.removeprefix(start): value for key, value in adapted.items() if key.startswith(start)}
        student = batch.student._replace(adapted={**batch.student.adapted, self.name: own})
        return replace(batch, student=student, teacher_output=(batch.teacher, *batch.others)[number], others=())
