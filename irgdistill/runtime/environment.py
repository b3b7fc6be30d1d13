"""The environment of a worker process, and how it reports its failure to the launcher."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

FAILURES = "IRGDISTILL_FAILURES"
"""Environment variable of a worker: the folder in which it reports a failure, for the launcher to print."""


def world_size() -> int:
    """Number of processes of the run, started by `torchrun` or `run_workers`; 1 for a single process."""
    return int(os.environ.get("WORLD_SIZE", 1))


def restart_count() -> int:
    """How often `torchrun --max-restarts` has restarted the processes of the run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def is_worker() -> bool:
    """Whether `run_workers` started this process, which then reports its failure instead of printing it."""
    return FAILURES in os.environ


def report_failure(message: str, code: int) -> bool:
    """Write the failure to the launcher's folder. Returns False if this is not a worker."""
    folder, rank = os.environ.get(FAILURES), int(os.environ.get("RANK", 0))
    if folder is None:
        return False
    failure = {"rank": rank, "time": time.time(), "message": message, "code": code}
    Path(folder, f"{rank}.json").write_text(json.dumps(failure), encoding="utf-8")
    return True
