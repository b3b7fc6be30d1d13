"""Shell completion of presets, methods, data sources, loggers and networks. Starts without torch."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import typer


def complete_preset(incomplete: str) -> list[str]:
    from irgdistill.config import presets

    return [name for name in presets() if name.startswith(incomplete)]


def complete_method(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the last of several methods, separated by commas."""
    from irgdistill.config import METHODS

    _load_plugins(context)
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in METHODS if name.startswith(last)]


def complete_source(context: typer.Context, incomplete: str) -> list[str]:
    _load_plugins(context)
    return [name for name in source_names() if name.startswith(incomplete) and not name.startswith(".")]


def complete_logger(context: typer.Context, incomplete: str) -> list[str]:
    _load_plugins(context)
    return [name for name in logger_names() if name.startswith(incomplete)]


def source_names() -> list[str]:
    """Values of `--data` beside folders, their prefixes, and endings of files."""
    from irgdistill.config import SOURCES

    return [word for word in SOURCES if word]


def logger_names() -> list[str]:
    from irgdistill.io import LOGGERS

    return list(LOGGERS)


def _load_plugins(context: typer.Context) -> None:
    """Load the plug-ins on the line, which may add to the names."""
    from irgdistill.config import load_plugin
    from irgdistill.errors import UserError

    words = context.args  # what a command leaves to the parser of `distill`
    behind = [word for option, word in pairwise(words) if option == "--plugin"]
    for path in (*(context.params.get("plugin") or ()), *behind):
        with suppress(UserError):
            load_plugin(path)


def complete_network(incomplete: str) -> list[str]:
    """Complete timm names from the file that `distill` and `models` write: importing timm would take seconds."""
    try:
        names = known_names_file().read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def known_names_file() -> Path:
    """The file of this version of timm, in `$IRGDISTILL_CACHE` or the user's cache folder."""
    own = os.environ.get("IRGDISTILL_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "irgdistill"
    return (Path(own) if own else cache) / f"networks-{version('timm')}.txt"


def remember_names() -> None:
    """Write the names for `complete_network`. If the cache cannot be written, networks are not completed."""
    from irgdistill.models import known_models

    path = known_names_file()
    with suppress(OSError):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(known_models()), encoding="utf-8")
