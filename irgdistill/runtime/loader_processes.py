"""How loader processes start: forked from this one while no GPU is in use, else from a server without CUDA.

A fork after CUDA has started copies its context and the state of its threads, which CUDA does not support.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from pickle import PicklingError
from types import ModuleType
from typing import Any

import torch

from irgdistill.errors import UserError, one_line
from irgdistill.plugins import import_plugin, imported_plugins
from irgdistill.runtime.signals import block_signals

if sys.platform == "linux":
    from multiprocessing.context import ForkServerContext as Context
    from multiprocessing.context import ForkServerProcess as Process
    from multiprocessing.forkserver import ensure_running
else:
    from multiprocessing.context import SpawnContext as Context
    from multiprocessing.context import SpawnProcess as Process

PRELOADED = ["irgdistill.data.loader"]
"""Modules that the server imports once for all loader processes, with torch and timm: some seconds."""


def loader_context() -> BaseContext:
    """How to start loader processes now: by a fork on Linux before CUDA has started, else as `LoaderProcess`."""
    if sys.platform == "linux" and not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    return LoaderContext()


def sharing_context() -> BaseContext:
    """Makes queues and values to share with loader processes, however they will start.

    Those that any process can take need a process that removes them, so they are made only where there is a GPU.
    """
    return multiprocessing.get_context("spawn" if torch.cuda.is_available() else None)


def start_server() -> None:
    """Start the server of loader processes, which imports while this process goes on. Does nothing but on Linux."""
    if sys.platform == "linux":
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        ensure_running()


class LoaderProcess(Process):
    """Imports the run's plug-ins, but not the user's script, which would start the run once more."""

    def start(self) -> None:
        """Raises UserError for images that cannot be sent to another process, such as of a class of the script."""
        start_server()
        script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            super().start()
        except (AttributeError, TypeError, PicklingError) as error:
            raise UserError(
                f"the images cannot be sent to loader processes: {one_line(error, 160)}; define what reads them in a "
                "module or a --plugin file, or give --workers 0"
            ) from None
        finally:
            sys.modules["__main__"] = script

    def run(self) -> None:
        """Ends with the process that started it, which is not its parent: that is the server."""
        threading.Thread(target=_end_with_starter, daemon=True).start()
        super().run()

    def __getstate__(self) -> dict[str, object]:
        return {"prepared": _Prepared(), **vars(self)}


def _end_with_starter() -> None:
    starter = multiprocessing.parent_process()
    assert starter is not None
    starter.join()
    os._exit(1)


class LoaderContext(Context):
    """Starts every process as a `LoaderProcess`."""

    Process = LoaderProcess


class _Prepared:
    """Unpickled first in a loader process: it prepares what is unpickled after it."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return _prepare, (imported_plugins(),)


def _prepare(plugins: Sequence[tuple[Path, str]]) -> None:
    block_signals()  # until `ignore_signals`
    for path, sha256 in plugins:
        import_plugin(path, sha256)
