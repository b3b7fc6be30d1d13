"""Starts worker processes on this machine through torch's launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from irgdistill.errors import Interrupted
from irgdistill.runtime.environment import FAILURES
from irgdistill.runtime.parent import lifeline


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_workers(count: int, arguments: Sequence[str]) -> None:
    """Run `irgdistill ARGUMENTS` in `count` processes on this machine, through torch's launcher.

    Each joins through `process_group`, and ends with this process, whose environment and logging are restored
    afterwards. Raises Interrupted with the message and exit code of the first worker to fail or stop.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // count)))
    with (
        TemporaryDirectory() as folder,
        _environment({FAILURES: folder, "OMP_NUM_THREADS": threads, **lifeline()}),
        _quiet_launcher(),
    ):
        try:
            elastic_launch(config, sys.executable)("-m", "irgdistill", *arguments)
        except ChildFailedError as error:
            raise _first_failure(folder, error.failures) from None
        except SignalException as error:
            raise _first_failure(folder, {}, error.sigval) from None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, for child processes to inherit, and restore them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Silence torch's launcher, whose report of a failed worker fills a screen."""
    logger = logging.getLogger("torch.distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_failure(folder: str, failures: Mapping[int, ProcessFailure], number: int = 0) -> Interrupted:
    """The first worker's failure. Workers that end only because another was killed are not reported."""
    written = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).iterdir()]
    reported = {failure["rank"] for failure in written}
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and rank not in reported:
            name = signal.Signals(-failure.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return Interrupted(128 - failure.exitcode, f"worker {rank} was killed by {name}{hint}")
    if written:
        first = min(written, key=lambda failure: float(failure["time"]))
        return Interrupted(first["code"], first["message"])
    if number:
        return Interrupted(128 + number, "interrupted")
    return Interrupted(1, "a worker ended without an error message")
