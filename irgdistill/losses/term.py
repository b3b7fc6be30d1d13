"""What a loss term is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from irgdistill.taps import Output


@dataclass(frozen=True)
class Batch:
    """Everything a term may compare."""

    student: Output
    targets: Tensor
    """(B,) class indices, or (B, K) probabilities of mixed images."""
    teacher_output: Output | None = None

    @property
    def teacher(self) -> Output:
        """The teacher's output; only terms of a run with a teacher ask for it."""
        assert self.teacher_output is not None, "a term asked for a teacher that this run does not have"
        return self.teacher_output


class Term(Protocol):
    """One raw scalar, a mean over its elements."""

    def __call__(self, batch: Batch) -> Tensor: ...
