"""Atomic writes: a file or folder is written whole or not at all.

The standard library has `os.replace` alone: it does not sync to disk, keep the previous file or replace a folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from irgdistill.io.run_folder import TEMPORARY


def write_atomically(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Let `write` fill a temporary file, sync it to disk, then move it to `path` in one step.

    The file that was at `path` is kept as `previous`, if that is given. An OSError changes nothing.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")  # a folder: `write` may create several files
    try:
        folder.mkdir(exist_ok=True)
        temporary = folder / path.name
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        sync(temporary)
        if previous is not None and path.exists():
            _keep(path, previous, folder / previous.name)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync(path.parent)


def _keep(path: Path, previous: Path, link: Path) -> None:
    """Rename `path` to `previous` through a hard link, so that both names exist at any moment."""
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        link = path
    os.replace(link, previous)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, then move it to `path`. An error changes nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    new, old = temporary / path.name, temporary / "old"
    try:
        new.mkdir(parents=True)
        write(new)
        for file in new.iterdir():
            file.chmod(0o666 & ~_umask())
            sync(file)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(path.parent)
