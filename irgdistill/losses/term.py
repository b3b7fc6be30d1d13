"""What a loss term is given, what it gives back, and what it needs of the networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from irgdistill.matching import Output, Tap


@dataclass(frozen=True)
class Batch:
    """Everything a term may compare."""

    student: Output
    labels: Tensor | None
    """(B,) class indices, or (B, K) probabilities of mixed images; None where the labels are not to be used."""
    teacher_output: Output | None = None

    @property
    def targets(self) -> Tensor:
        """The labels; only terms of a run on labels ask for them."""
        assert self.labels is not None, "a term asked for labels that this run does not use"
        return self.labels

    @property
    def teacher(self) -> Output:
        """The teacher's output; only terms of a run with a teacher ask for it."""
        assert self.teacher_output is not None, "a term asked for a teacher that this run does not have"
        return self.teacher_output


class Term(ABC):
    """One raw scalar, a mean over its elements."""

    teacher_taps: Sequence[Tap] = ()
    """Taps that the term compares pooled, in `Output.features`."""
    student_taps: Sequence[Tap] = ()
    teacher_maps: Sequence[Tap] = ()
    """Taps that it compares as whole maps, in `Output.maps`."""
    student_maps: Sequence[Tap] = ()
    teacher_energies: Sequence[Tap] = ()
    """Taps of which it compares the squares summed over channels, in `Output.energies`."""
    student_energies: Sequence[Tap] = ()
    adapter: nn.Module | None = None
    """Trained beside the student and not part of it: (images, student's output) -> tensors by name, which the term
    finds in `Output.adapted`."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor: ...
