"""The section `losses` of a configuration: a field for each registered term. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic.fields import FieldInfo

from irgdistill.config.fields import Fade, Section
from irgdistill.config.methods import METHODS, TERMS, Kind, Method, TermSettings
from irgdistill.errors import UserError, nearest


class LossesConfig(Section):
    """The settings of every term by its name. `declare_terms` adds the fields."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def weights(self) -> dict[str, float]:
        """Every term with its weight, in the order of the fields; 0 is off."""
        return {name: getattr(self, name).weight or 0.0 for name in type(self).model_fields}

    def fades(self) -> dict[str, Fade]:
        """Terms that fade out, and between which shares of the training."""
        return self._shares("fade")

    def rises(self) -> dict[str, Fade]:
        """Terms whose weight rises from 0, and between which shares of the training."""
        return self._shares("rise")

    def _shares(self, key: str) -> dict[str, Fade]:
        given = {name: getattr(getattr(self, name), key, None) for name in type(self).model_fields}
        return {name: shares for name, shares in given.items() if shares is not None}

    def needing_all_logits(self) -> list[str]:
        """Terms with a weight for which the teacher's largest logits are not enough."""
        settings = {name: getattr(self, name) for name in self.comparing("logits")}
        return [name for name in settings if TERMS[name].all_logits or settings[name].all_logits]

    def compares(self, name: str) -> frozenset[Kind]:
        """What a term compares under its settings."""
        settings, declared = getattr(self, name), TERMS[name].compares
        return settings.compares(declared) if isinstance(settings, TermSettings) else declared

    def comparing(self, *kinds: Kind) -> list[str]:
        """Terms with a weight that compare any of these."""
        return [name for name, weight in self.weights().items() if weight > 0 and self.compares(name) & set(kinds)]

    def hints(self) -> list[str]:
        """Terms with a weight that compare more than the labels."""
        return [name for name, weight in self.weights().items() if weight > 0 and TERMS[name].compares != {"labels"}]

    def filled(self, method: Method, labels: bool) -> LossesConfig:
        """The same with unset weights and fades from `method`; without `labels` nothing is learned from them."""
        unset: dict[str, Any] = {}
        for name in type(self).model_fields:
            settings = getattr(self, name)
            if not labels and TERMS[name].compares == {"labels"} and "weight" not in settings.model_fields_set:
                unset[f"{name}.weight"] = 0.0
            if settings.weight is None:
                unset[f"{name}.weight"] = method.weights.get(name, 0.0)
            if name in method.fades and settings.fade is None:
                unset[f"{name}.fade"] = method.fades[name]
        for path, value in method.settings.items():
            name, _, key = path.partition(".")
            if key not in getattr(self, name).model_fields_set:
                unset[path] = value
        return self.replaced(unset)


def declare_terms() -> bool:
    """Give `LossesConfig` the fields of the registered terms; returns whether they changed.

    A model that contains it must be rebuilt then. Raises UserError for a method with a term that does not exist.
    """
    fields = LossesConfig.model_fields
    if [(name, info.annotation) for name, info in fields.items()] == [(name, TERMS[name].settings) for name in TERMS]:
        return False
    for name, method in METHODS.items():
        for unknown in (*method.weights, *method.fades, *(path.partition(".")[0] for path in method.settings)):
            if unknown not in TERMS:
                raise UserError(f"method {name!r} has no term {unknown!r}{nearest(unknown, TERMS)}")
    fields.clear()
    for name, spec in TERMS.items():
        fields[name] = FieldInfo(annotation=spec.settings, default_factory=spec.settings, description=spec.summary)
    if LossesConfig.__pydantic_complete__:
        LossesConfig.model_rebuild(force=True)
    return True


declare_terms()
