"""A loss term: what it is built from, what it is given, what it needs of the networks. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from irgdistill.config import Kind, Section, TermSettings, method, term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from irgdistill.config import LossesConfig
    from irgdistill.matching import Output, Plan, Tap, Tapped
    from irgdistill.runtime import World

__all__ = ["Batch", "Counterpart", "Skip", "Term", "TermContext", "TermSettings", "method", "term"]


class Skip(Exception):
    """Raised by the constructor of a term that these networks do not allow: the run goes on without it and warns."""


@dataclass(frozen=True)
class Batch:
    """Everything a term may compare."""

    student: Output
    labels: Tensor | None
    """(B,) class indices, or (B, K) probabilities of mixed images; None in a run without labels."""
    teacher_output: Output | None = None
    others: Sequence[Output] = ()
    """Outputs of the further teachers, in a run with several."""

    @property
    def targets(self) -> Tensor:
        """The labels, for a term that compares `labels`."""
        assert self.labels is not None, "a term asked for labels that this run does not use"
        return self.labels

    @property
    def teacher(self) -> Output:
        """The teacher's output, for a term that compares any part of it."""
        assert self.teacher_output is not None, "a term asked for a teacher that this run does not have"
        return self.teacher_output


@dataclass(frozen=True)
class Counterpart:
    """A teacher beside the first, as far as terms are built from it."""

    matched: Plan | None = None
    embedding_widths: tuple[int, int] | None = None
    weight: float = 1.0
    """Its share in a mean over the teachers, relative to the others'."""


@dataclass(frozen=True)
class TermContext:
    """Everything a term may be built from, beside its own settings."""

    losses: LossesConfig
    """The settings of all terms."""
    world: World
    """The processes whose images a relation spans."""
    matched: Plan | None = None
    booster_network: Tapped | None = None
    class_weights: Tensor | None = None
    """(K,) weights of the classes."""
    embedding_widths: tuple[int, int] | None = None
    """Widths of the student's and the teacher's embeddings."""
    labelled_share: float = 1.0
    """Share of the training images with a label; the others have a negative one."""
    others: Mapping[str, frozenset[Kind]] | None = None
    """The terms with a weight, and what each compares."""

    @property
    def plan(self) -> Plan:
        """The matched stages, for a term that compares features, energies, grids or maps."""
        assert self.matched is not None, "a term asked for matched stages without declaring that it compares any"
        return self.matched

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the student's and the teacher's embeddings, for a term that compares `embedding`."""
        assert self.embedding_widths is not None, "a term asked for embeddings without declaring that it compares them"
        return self.embedding_widths

    @property
    def booster(self) -> Tapped:
        """The network that is trained beside the student, for a term that compares `booster`."""
        assert self.booster_network is not None, "a term asked for a booster without declaring that it compares one"
        return self.booster_network

    def compared(self, kind: Kind) -> bool:
        """Whether a term with a weight compares `kind`."""
        return any(kind in kinds for kinds in (self.others or {}).values())


class Term(ABC):
    """One raw scalar per batch, a mean over its elements. `@term` registers a subclass under its name.

    `__init__` may raise `Skip`, or UserError if the term cannot work at all. Taps are set there; the default keeps the
    settings.
    """

    Settings: ClassVar[type[Section]] = TermSettings
    """The section `losses.NAME`; a subclass with settings of its own derives it from `TermSettings`."""
    teacher_taps: Sequence[Tap] = ()
    """Taps that the term compares pooled, in `Output.features`."""
    student_taps: Sequence[Tap] = ()
    teacher_maps: Sequence[Tap] = ()
    """Taps that it compares as whole maps, in `Output.maps`."""
    student_maps: Sequence[Tap] = ()
    teacher_energies: Sequence[Tap] = ()
    """Taps of which it compares the squares summed over channels, in `Output.energies`."""
    student_energies: Sequence[Tap] = ()
    teacher_grids: Sequence[Tap] = ()
    """Taps that it compares as grids of cells, in `Output.grids`."""
    student_grids: Sequence[Tap] = ()
    adapter: nn.Module | None = None
    """Trained beside the student and not part of it: (images, student's output) -> tensors by name, which the term
    finds in `Output.adapted`."""
    companions: Mapping[str, Term] = {}
    """Terms of weight 1 that go with this one, by the name of their record."""

    def __init__(self, settings: Any, context: TermContext) -> None:
        self.settings = settings

    def of_teacher(self, number: int) -> Term | None:
        """The term that is compared with this teacher, counted from 0: this one, unless there is one for each."""
        return self

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """Raw mean of the term, a scalar."""
