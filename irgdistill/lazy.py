"""Modules imported on first use, so that a file declares what it adds without loading torch (the idea of PEP 810)."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """A module of this name, imported when an attribute of it is first read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


def lazy(name: str) -> LazyModule:
    """The module `name`, not yet imported. For type checkers, import it under `TYPE_CHECKING`:

    if TYPE_CHECKING:
        import torch
    else:
        torch = lazy("torch")
    """
    return LazyModule(name)
