"""Starts worker processes on this machine through torch's launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from irgdistill.errors import Interrupted
from irgdistill.runtime.environment import FAILURES

# --- starting workers -------------------------------------------------------------------------------------------------


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_workers(count: int, arguments: Sequence[str]) -> None:
    """Run `irgdistill ARGUMENTS` in `count` processes on this machine, through torch's launcher.

    Each joins by `joined`. Raises Interrupted with the message and exit code of the first worker to fail or stop.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its report of a failure is a screenful
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
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
    with TemporaryDirectory() as folder:
        os.environ[FAILURES] = folder
        try:
            elastic_launch(config, sys.executable)("-m", "irgdistill", *arguments)
        except ChildFailedError as error:
            raise _first_failure(folder, error.failures) from None
        except SignalException as error:
            raise _first_failure(folder, {}, error.sigval) from None
        finally:
            del os.environ[FAILURES]


def _first_failure(folder: str, failures: Mapping[int, ProcessFailure], number: int = 0) -> Interrupted:
    """What the first worker to fail wrote; those that a killed one drags along are not to blame."""
    written = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).iterdir()]
    ranks_that_spoke = {failure["rank"] for failure in written}
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and rank not in ranks_that_spoke:
            name = signal.Signals(-failure.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return Interrupted(128 - failure.exitcode, f"worker {rank} was killed by {name}{hint}")
    if written:
        first = min(written, key=lambda failure: float(failure["time"]))
        return Interrupted(first["code"], first["message"])
    return Interrupted(128 + number if number else 1, "interrupted" if number else "a worker ended without a word")
