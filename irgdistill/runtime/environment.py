"""What a process that was started among others finds in its environment, and how it says why it ends."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

FAILURES = "IRGDISTILL_FAILURES"
"""Environment variable of a worker: the folder in which it says why it ended; the process that started it speaks."""


def ranks() -> int:
    """How many processes this one was started among: by `torchrun`, or by `run_workers`."""
    return int(os.environ.get("WORLD_SIZE", 1))


def restarts() -> int:
    """How often `torchrun --max-restarts` has started these processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def leave_word(message: str, code: int) -> bool:
    """In a worker, write why it ends, for the process that started it; False elsewhere."""
    folder, rank = os.environ.get(FAILURES), int(os.environ.get("RANK", 0))
    if folder is None:
        return False
    failure = {"rank": rank, "time": time.time(), "message": message, "code": code}
    Path(folder, f"{rank}.json").write_text(json.dumps(failure), encoding="utf-8")
    return True
