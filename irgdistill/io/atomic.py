"""Atomic writes: a file or folder is written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from irgdistill.io.run_folder import TEMPORARY


def write_atomically(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """`write` fills a temporary file, which then takes the place of `path` in one step and survives a power cut.

    What was at `path` stays under the name `previous`, if that is given. After an OSError all is as it was before.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")  # a folder, as `write` may make further files
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
    """A second name for what is at `path`, so that there is a file under both names at any moment."""
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        link = path
    os.replace(link, previous)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
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
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary folder, which then takes the place of `path`. After an error all is as it was."""
    around = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    new, old = around / path.name, around / "old"
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
        shutil.rmtree(around, ignore_errors=True)
    sync(path.parent)
