"""The launcher leaves the process that calls it as it was."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import pytest

from irgdistill.runtime import run_workers, workers


def test_environment_and_logging_are_set_for_the_workers_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(workers, "cores", lambda: 8)
    logger = logging.getLogger("torch.distributed")
    seen: dict[str, Any] = {}

    def launch(_config: Any, _executable: str) -> Callable[..., None]:
        seen.update(threads=os.environ["OMP_NUM_THREADS"], failures=os.environ["IRGDISTILL_FAILURES"])
        seen["level"] = logger.level
        return lambda *_: None

    monkeypatch.setattr(workers, "elastic_launch", launch)
    before, level = dict(os.environ), logger.level
    run_workers(2, ["distill"])
    assert seen["threads"] == "4" and seen["failures"] and seen["level"] == logging.CRITICAL
    assert dict(os.environ) == before and logger.level == level


def test_a_number_of_threads_that_the_user_set_reaches_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    seen: list[str] = []

    def launch(_config: Any, _executable: str) -> Callable[..., None]:
        seen.append(os.environ["OMP_NUM_THREADS"])
        return lambda *_: None

    monkeypatch.setattr(workers, "elastic_launch", launch)
    run_workers(2, ["distill"])
    assert seen == ["3"] and os.environ["OMP_NUM_THREADS"] == "3"
