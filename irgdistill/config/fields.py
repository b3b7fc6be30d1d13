"""Types of the settings, and the base class of their sections. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticKnownError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class OneOf:
    """Validator of a name that must be registered in `names`; reports the names as a literal type does."""

    names: Mapping[str, Any]

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str) and value in self.names:
            return value
        *most, last = (repr(name) for name in self.names)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(most)} or {last}"})


def _size(value: Any) -> Any:
    """224, "224", "256x192" or [256, 192] -> (height, width)."""
    if isinstance(value, str):
        if not re.fullmatch(r"\d+(x\d+)?", value.lower()):
            raise ValueError("expected pixels, such as 224 or 256x192")
        value = [int(part) for part in value.lower().split("x")]
    if isinstance(value, int):
        value = [value]
    if isinstance(value, list) and len(value) == 1:
        value = value * 2
    return value


def _names(value: Any) -> Any:
    """ "a,b" -> ["a", "b"]."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _channels(value: Any) -> Any:
    """0.5, "0.5" or "0.485,0.456,0.406" -> a value for each of the three channels."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)):
        value = [value]
    if len(value) not in (1, 3):
        raise ValueError("expected one number, or three: R,G,B")
    return list(value) * 3 if len(value) == 1 else value


def _in_order(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the weight changes from the first share to the second, which cannot be the smaller")
    return value


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the first cannot be the larger")
    return value


def _leaves(value: Any) -> Iterator[Any]:
    """Values inside lists and mappings, and the keys of mappings."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


LARGEST = 2**31 - 1
"""Largest whole number in any setting."""


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


Pixels = Annotated[int, Field(ge=1, le=2**14)]


Size = Annotated[tuple[Pixels, Pixels], BeforeValidator(_size)]


Count = Annotated[int, Field(ge=1)]


Positive = Annotated[float, Field(gt=0)]


NonNegative = Annotated[float, Field(ge=0)]


Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]


CropShare = Annotated[float, Field(ge=0.1, le=2)]


Range = Annotated[tuple[Positive, Positive], AfterValidator(_rising)]


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


Probability = Annotated[float, Field(ge=0, le=1)]


Share = Annotated[float, Field(gt=0, lt=1)]


Deviation = Annotated[float, Field(gt=0, le=1)]


Mean = Annotated[tuple[Probability, Probability, Probability], BeforeValidator(_channels)]


Std = Annotated[tuple[Deviation, Deviation, Deviation], BeforeValidator(_channels)]


Fade = Annotated[tuple[Probability, Probability], BeforeValidator(_names), AfterValidator(_in_order)]


class Section(BaseModel):
    """Settings that are validated once and do not change afterwards; `replaced` makes a changed copy."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        defer_build=True,  # the help reads the fields only: validators are built when something is validated
    )

    @field_validator("*")
    @classmethod
    def _check_limits(cls, value: Any) -> Any:
        for item in _leaves(value):
            if isinstance(item, int) and abs(item) > LARGEST:
                raise ValueError(f"expected at most {LARGEST}")
            if isinstance(item, (str, Path)) and "\0" in str(item):
                raise ValueError("expected text without null characters")
        return value

    def replaced(self, values: Mapping[str, Any]) -> Self:
        """Copy with `values`, {"key.path": value}, which are not validated again."""
        changed: dict[str, Any] = {}
        for path, value in values.items():
            name, _, below = path.partition(".")
            changed[name] = changed.get(name, getattr(self, name)).replaced({below: value}) if below else value
        return self.model_copy(update=changed)
