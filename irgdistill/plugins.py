"""Registries, filled by the files of a folder of the package and by plug-in files. Imports no torch."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Generic, TypeVar

from irgdistill.errors import UserError, nearest

Entry = TypeVar("Entry")

LAST = 1000
"""Place of an entry that names none: behind those of the package, by name."""


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by name, sorted by their place.

    Reading it first imports every file of `package`, which registers what the package itself provides: a new entry is
    a new file there. Those files load torch only when they are used (see `lazy`).
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        """The noun in messages, such as `method`."""
        self._package, self._loaded = package, False
        self._entries: dict[str, tuple[int, Entry]] = {}
        _REGISTRIES.append(self)

    def add(self, name: str, entry: Entry, place: int = LAST) -> None:
        """Register `entry`. Raises UserError for a name that is taken."""
        if name in self._entries:
            raise UserError(f"{self.kind} {name!r} is already registered; give it another name")
        self._entries[name] = place, entry

    def find(self, name: str) -> Entry:
        """The entry of that name. Raises UserError with the nearest names."""
        if name not in self:
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self)} (known: {', '.join(self)})")
        return self[name]

    def __getitem__(self, name: str) -> Entry:
        self._load()
        return self._entries[name][1]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries, key=lambda name: (self._entries[name][0], name)))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def entries(self) -> dict[str, tuple[int, Entry]]:
        """Name -> place and entry."""
        self._load()
        return dict(self._entries)

    def replace(self, entries: Mapping[str, tuple[int, Entry]]) -> None:
        """Take these entries in place of the present ones."""
        self._entries = dict(entries)

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            for module in iter_modules(import_module(self._package).__path__, f"{self._package}."):
                import_module(module.name)


_REGISTRIES: list[Registry[Any]] = []

_LOADED: dict[str, Path] = {}
"""SHA-256 -> the latest path of every plug-in of this process."""

_PATHS: dict[Path, str] = {}
"""Path -> SHA-256, for every path by which a plug-in was asked for."""


def snapshot() -> Callable[[], None]:
    """Return a function that takes back what was registered since, and the plug-ins imported since."""
    entries, loaded, paths = [registry.entries() for registry in _REGISTRIES], dict(_LOADED), dict(_PATHS)

    def restore() -> None:
        for registry, before in zip(_REGISTRIES, entries, strict=False):
            registry.replace(before)
        _LOADED.clear()
        _LOADED.update(loaded)
        _PATHS.clear()
        _PATHS.update(paths)

    return restore


def import_plugin(
    path: str | Path, sha256: str | None = None, check: Callable[[], object] = lambda: None
) -> tuple[Path, str]:
    """Import a Python file that registers something -> absolute path, SHA-256. The same content is imported once.

    With `sha256` the file must have that content; if it is gone, a plug-in of that content that was imported from
    elsewhere replaces it. `check` is called after the import. Raises UserError: no such file, other content, a file
    that does not import, or as `check`; then nothing of it stays registered.
    """
    path = Path(path).resolve()
    if not path.is_file() and sha256 in _LOADED:
        _PATHS[path] = sha256
        return _LOADED[sha256], sha256
    if not path.is_file():
        raise UserError(f"--plugin {path}: no such file")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 not in (None, found):
        raise UserError(f"the plugin {path} has changed: its sha256 is {found}, was {sha256}")
    if found not in _LOADED:
        restore = snapshot()
        try:
            _import(path, _module_name(found))
            check()
        except Exception as error:
            restore()
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(f"--plugin {path}: {' '.join(why.split())}") from None
    _LOADED[found], _PATHS[path] = path, found
    return path, found


def find_plugin(path: Path, sha256: str | None = None) -> tuple[ModuleType, str] | None:
    """The imported plug-in and its SHA-256: of this content, else of this path, else the only one of this file name."""
    same_name = {found for known, found in _PATHS.items() if known.name == path.name}
    of_path = _PATHS.get(path.resolve(), next(iter(same_name)) if len(same_name) == 1 else None)
    found = sha256 if sha256 in _LOADED else of_path
    return None if found is None else (sys.modules[_module_name(found)], found)


def _module_name(sha256: str) -> str:
    return f"irgdistill_plugin_{sha256[:16]}"


def imported_plugins() -> list[tuple[Path, str]]:
    """Path and SHA-256 of every plug-in of this process, as `import_plugin` takes them in another one."""
    return [(path, sha256) for sha256, path in _LOADED.items()]


def _import(path: Path, name: str) -> None:
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("not a Python file (.py)")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, pickle and pydantic look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
