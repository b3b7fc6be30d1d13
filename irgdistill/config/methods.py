"""Loss terms by name, and methods, which are named sets of their weights. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import getdoc
from typing import Any, Literal, TypeVar

from irgdistill.config.fields import Fade, Section, Weight
from irgdistill.errors import UserError
from irgdistill.plugins import LAST, Registry

Kind = Literal["labels", "views", "logits", "embedding", "booster", "features", "energies", "grids", "maps"]
"""Something a term compares: the labels; two views of each image; the teacher's logits; its embedding; the logits of a
booster, a network like the teacher that is trained beside the student; of matched stages the pooled features, the
energies (squares summed over channels), the grids (means over cells, at most 8×8) or the whole maps."""

STAGE_KINDS: tuple[Kind, ...] = ("features", "energies", "grids", "maps")
"""Kinds that need matched stages."""

TEACHER_KINDS: tuple[Kind, ...] = ("logits", "embedding", *STAGE_KINDS)
"""Kinds that need the trained teacher."""

RESERVED = ("loss", "weights", "fades", "rises", "needing_all_logits", "compares", "comparing", "hints", "filled")

Cls = TypeVar("Cls", bound=type)


class TermSettings(Section):
    """Settings that every hint has; a term with more derives its own class from this one."""

    weight: Weight | None = None
    """Factor of this term's mean; default: what the method gives it."""
    fade: Fade | None = None
    """Shares of the training between which the weight falls to 0, `[0.3, 0.6]`; default: the method's; `[1, 1]`: never.
    A faded term is no longer computed, unless it trains something beside the student."""
    rise: Fade | None = None
    """Shares of the training between which the weight rises from 0, `[0, 0.1]`; default: none, whole from the start."""

    @property
    def all_logits(self) -> bool:
        """Whether these settings need every logit of the teacher; see `term`."""
        return False

    def compares(self, declared: frozenset[Kind]) -> frozenset[Kind]:
        """What the term compares under these settings; overridden where they change what is `declared`."""
        return declared


@dataclass(frozen=True)
class TermSpec:
    """A registered term."""

    cls: Any
    """The `Term`; called with its settings and a `TermContext`."""
    settings: type[Section]
    compares: frozenset[Kind]
    weight: float | None
    """Weight of the method that is named after the term; None: there is no such method."""
    all_logits: bool
    source: str
    summary: str


@dataclass(frozen=True)
class Method:
    """Weights of hints beside cross-entropy, the fades of some of them, and other settings of terms."""

    weights: Mapping[str, float]
    fades: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """{"term.setting": value} that replaces the setting's own default."""


AUTO = "auto"
"""The method that is chosen when teacher and data are known: `DEFAULT_METHOD`, or `ENCODER_METHOD`."""

DEFAULT_METHOD = "irg+kd+at"
"""Where the teacher's classes are the data's."""

ENCODER_METHOD = "encoder"
"""For a teacher without a classifier, or with other classes."""


TERMS: Registry[TermSpec] = Registry("term", "irgdistill.losses.terms")

METHODS: Registry[Method] = Registry("method", "irgdistill.losses.terms")
"""Every term is a mean, so that weights do not depend on the batch. Those of other papers are theirs, or common
practice, converted to means: see the terms."""


def term(
    name: str,
    *,
    compares: Kind | tuple[Kind, ...],
    weight: float | None = None,
    all_logits: bool = False,
    source: str = "",
    place: int = LAST,
) -> Callable[[Cls], Cls]:
    """Register a `Term` under `name`: its settings are the section `losses.NAME`, its class is used to build it.

    With a `weight`, `--method NAME` is this term alone with that weight. `compares` decides what the term may ask of
    its context and its batch. `all_logits`: the largest logits alone, which a teacher cache may keep, are not enough.
    `place` orders the terms in configurations and in the sum. Raises UserError for a name that is taken or no key.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in RESERVED or hasattr(Section, name):
        raise UserError(
            f"a term cannot be named {name!r}: expected lower-case letters, digits and _, and no key in use"
        )
    kinds: frozenset[Kind] = frozenset((compares,) if isinstance(compares, str) else compares)

    def register(cls: Cls) -> Cls:
        summary = " ".join((getdoc(cls) or name).partition("\n\n")[0].split())
        settings: type[Section] = cls.Settings  # type: ignore[attr-defined]
        TERMS.add(name, TermSpec(cls, settings, kinds, weight, all_logits, source, summary), place)
        if weight is not None:
            METHODS.add(name, Method({name: weight}), min(100 + place, LAST))
        return cls

    return register


def method(
    name: str,
    weights: Mapping[str, float],
    fades: Mapping[str, tuple[float, float]] | None = None,
    settings: Mapping[str, Any] | None = None,
    place: int = LAST,
) -> None:
    """Register a method: weights of its terms, shares of the training between which some fade out, other settings.

    Raises UserError for a name that is taken.
    """
    METHODS.add(name, Method(dict(weights), dict(fades or {}), dict(settings or {})), place)


method(AUTO, {}, place=-1)
method("none", {}, place=0)
method("kd", {"kd": 1.0}, place=1)
method("irg", {"logits": 0.5, "edges": 5.0}, place=2)
method("mtk", {"logits": 0.5, "edges": 5.0, "transform": 1.0}, place=3)
method("irg+kd", {"logits": 0.1, "edges": 5.0, "transform": 1.0, "kd": 1.0}, place=4)
method("kd+at", {"kd": 1.0, "attention": 100.0}, place=5)
method(
    "irg+kd+at",
    {"edges": 2.5, "transform": 0.5, "kd": 1.0, "attention": 100.0},
    fades={"attention": (0.3, 0.6)},
    place=6,
)
method("relations", {"edges": 5.0, "transform": 1.0}, place=7)
method(ENCODER_METHOD, {"edges": 5.0, "transform": 1.0, "positions": 15.0, "embedding": 30.0}, place=8)
