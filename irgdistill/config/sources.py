"""Registry of data sources: what the value of `--data` means. Imports no torch.

To add one, write a file with a function under `@source("WORD")` into `irgdistill/data/sources`, or into a plug-in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from irgdistill.config.schema import DataConfig
from irgdistill.errors import UserError, nearest, nearest_path
from irgdistill.plugins import Registry

Opener = TypeVar("Opener", bound=Callable[..., Any])


@dataclass(frozen=True)
class SourceEntry:
    """A declared data source."""

    word: str
    """The value of `--data`; its beginning if this ends in `/`, the ending of a file if it begins with a dot; empty for
    other paths."""
    open: Callable[..., Any]
    """(DataConfig, val_only) -> Splits. With `val_only`, the training images will not be used."""
    open_unlabelled: Callable[..., Any] | None
    """(DataConfig, val_only, classes of the teacher) -> Splits. None: `open`, then hide the training labels."""
    local: bool
    """Whether the rest of the value may be a folder, which a saved run keeps as an absolute path."""
    remote: bool
    """Whether a rest that is no folder is looked up on the network."""
    package: str
    """Package that it needs, or an empty string."""
    install: str
    """What pip installs that package by."""
    paths: Callable[..., list[str]] | None = None
    """DataConfig -> the paths of all images, for commands that need no labels. None: those of its splits."""

    @property
    def is_path(self) -> bool:
        """Whether the value is the path of a file or folder."""
        return not self.word or self.word.startswith(".")

    def matches(self, value: str) -> bool:
        if self.is_path:
            return value.lower().endswith(self.word)
        return value.startswith(self.word) if self.word.endswith("/") else value == self.word


SOURCES: Registry[SourceEntry] = Registry("data source", "irgdistill.data.sources")
"""Data sources by their word."""


def source(
    word: str,
    *,
    local: bool = False,
    remote: bool = False,
    package: str = "",
    install: str = "",
    open_unlabelled: Callable[..., Any] | None = None,
    paths: Callable[..., list[str]] | None = None,
) -> Callable[[Opener], Opener]:
    """Declare a function (DataConfig, val_only) -> Splits as the data source of `--data WORD`.

    A word that ends in `/` is a prefix: `wds/` takes `--data wds/NAME`; one that begins with a dot is the ending of a
    file: `.csv` takes `--data FILE.csv`. The function needs `package`, imported when it
    is called and installed by `pip install INSTALL` (default: its name). See `SourceEntry` for the rest.
    """

    def declare(function: Opener) -> Opener:
        entry = SourceEntry(word, function, open_unlabelled, local, remote, package, install or package, paths)
        SOURCES.add(word, entry)
        return function

    return declare


def find_source(value: str) -> SourceEntry:
    """The data source of a value of `--data`: the longest word that matches, names and prefixes before endings.

    The empty word matches any path.
    """
    matching = (entry for entry in SOURCES.values() if entry.matches(value))
    return max(matching, key=lambda entry: (not entry.is_path, len(entry.word)))


def source_words() -> list[str]:
    """Values of `--data` beside folders, such as `FILE.csv`, `digits` and `wds/NAME`."""
    return [f"{'FILE' * word.startswith('.')}{word}{'NAME' * word.endswith('/')}" for word in SOURCES if word]


def check_source(data: DataConfig) -> None:
    """Raises UserError if no data is named, a path does not exist or a package is missing."""
    if not data.source:
        raise UserError("no data: give --data FOLDER, --data digits or a timm dataset string such as torch/cifar10")
    entry = find_source(data.source)
    if entry.is_path and not Path(data.source).exists():
        near = nearest(data.source, [word for word in SOURCES if word and not word.endswith("/")])
        near = near or nearest_path(data.source)
        kind = "file" if entry.word else "folder"
        raise UserError(f"no data {kind} {data.source!r}{near} (a folder, or {', '.join(source_words())})")
    if entry.package and find_spec(entry.package) is None:
        raise UserError(f"--data {data.source} needs the package {entry.package}: pip install {entry.install}")


def is_remote(value: str) -> bool:
    """Whether the data set is looked up on the network: a name that is no folder here."""
    entry = find_source(value)
    return entry.remote and not Path(value.removeprefix(entry.word)).is_dir()


def absolute_source(value: str) -> str:
    """The same data, from whatever folder the run is continued: paths become absolute."""
    entry = find_source(value)
    word = "" if entry.is_path else entry.word
    rest = value.removeprefix(word)
    absolute = rest and entry.local and Path(rest).exists()
    return word + str(Path(rest).resolve()) if absolute else value
