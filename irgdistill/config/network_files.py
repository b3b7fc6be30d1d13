"""Names of networks that a function in a Python file makes: FILE.py:FUNCTION. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from irgdistill.errors import UserError, nearest

FUNCTION = re.compile(r"(?P<file>.*\.py):(?P<function>[^:/]*)", re.DOTALL)


def split_function(name: str | None) -> tuple[Path, str] | None:
    """FILE.py:FUNCTION -> the file and the function; None for any other name."""
    found = FUNCTION.fullmatch(name or "")
    return None if found is None else (Path(found["file"]), found["function"])


def join_function(path: Path, function: str) -> str:
    """The name that `split_function` splits."""
    return f"{path}:{function}"


def architecture_of(name: str) -> str:
    """The architecture of a network's name: without a weight tag; FILE.FUNCTION of a function."""
    made = split_function(name)
    return name.split(".")[0] if made is None else f"{made[0].stem}.{made[1]}"


def public_name(name: str | None) -> str | None:
    """A network's name without the path to its file or its `local-dir:`."""
    kind, colon, folder = (name or "").partition("local-dir:")
    if colon and not kind:
        return f"local-dir:{Path(folder).name}"
    made = split_function(name)
    return name if made is None else join_function(Path(made[0].name), made[1])


def check_function(name: str) -> tuple[Path, str]:
    """The absolute path and the function of FILE.py:FUNCTION. Raises UserError: no such file, no function named."""
    made = split_function(name)
    assert made is not None
    path, function = made[0].resolve(), made[1]
    if not path.is_file():
        near = nearest(path.name, [file.name for file in path.parent.glob("*.py")])
        raise UserError(f"{name}: no file {path}{near}")
    if not function.isidentifier():
        raise UserError(f"{name}: expected {made[0]}:FUNCTION, with the name of a function in that file")
    return path, function
