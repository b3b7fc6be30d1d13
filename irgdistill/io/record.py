"""Typed records: what is read back from a file becomes one validated object, or one line that names file and field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from irgdistill.errors import UserError, one_line

if TYPE_CHECKING:
    from typing_extensions import Self


class Record(BaseModel):
    """Values of a file. Unknown fields are ignored: a newer version of the same format may have written them."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, arbitrary_types_allowed=True)

    @classmethod
    def parse(cls, values: object, path: Path, what: str = "values") -> Self:
        """Validate the values read from `path`. Raises UserError: `path` has `what` that do not fit, and the field."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            reason = one_line(f"{field}: " * bool(field) + reason[0].lower() + reason[1:], 300)
            raise UserError(f"{path} has {what} that do not fit: {reason}") from None

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read a JSON file. Raises UserError if it is missing, no JSON, or does not fit."""
        return cls.parse(read_json(path), path)


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError if it is missing, unreadable, or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {one_line(error.strerror or error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON ({one_line(error, 100)})") from None


# --- metrics ----------------------------------------------------------------------------------------------------------

Number = Annotated[int, Field(ge=-(2**63), lt=2**63)] | Annotated[float, Field(allow_inf_nan=True)]


SELECTING = {
    "top1": "top-1",
    "agreement": "agreement",
    "knn_top1": "k-NN top-1",
    "neighbours": "shared neighbours",
}
"""Metrics that select the best weights, in percent, and their titles; the first that is measured counts."""


def _evaluation(values: Mapping[str, Number]) -> Mapping[str, Number]:
    if values and not ("epoch" in values and any(name in values for name in SELECTING)):
        raise ValueError(f"expected an epoch and one of {', '.join(SELECTING)}")
    return values


Evaluation = Annotated[dict[str, Number], AfterValidator(_evaluation)]
"""Metrics of an evaluation with its epoch, or nothing before the first one."""


class Summary(Record):
    """summary.json of a finished run: what other commands read of it."""

    epochs: int
    seconds: Annotated[float, Field(ge=0)]
    """Time of training, without evaluation."""
    images_per_second: Annotated[float, Field(ge=0)]
    top1: float | None = None
    """Of the best epoch, in percent."""
    agreement: float | None = None
    """The same for a run that was validated without labels."""
    knn_top1: float | None = None
    """The same for a student without classes. This and the next: of held-out embeddings."""
    neighbours: float | None = None
    last_top1: float | None = None
    """After the last epoch."""
    last_agreement: float | None = None
    last_knn_top1: float | None = None
    last_neighbours: float | None = None
