"""Distil any timm teacher into any timm student with Instance Relationship Graphs (Liu et al., CVPR 2019)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irgdistill.api import Distiller, distill, match
    from irgdistill.config import load_config
    from irgdistill.errors import UserError
    from irgdistill.losses import DistillLoss
    from irgdistill.matching import Plan
    from irgdistill.settings import Config

__version__ = "0.1.0"

__all__ = ["Config", "DistillLoss", "Distiller", "Plan", "UserError", "distill", "load_config", "match"]

_HOMES = {
    **dict.fromkeys(("Distiller", "distill", "match"), "api"),
    **dict.fromkeys(("Config", "load_config"), "config"),
    "DistillLoss": "losses",
    "Plan": "matching",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    """What is asked for is imported then: `import irgdistill` alone costs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
