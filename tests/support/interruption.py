"""Commands cut short on purpose, and everything a run folder holds except times. `benchmarks/kill.py` uses it too."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES = {"seconds", "images_per_second", "images_seen", "metrics_mark"}


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a finished run leaves that is not a time: weights with their metadata, metrics, summary, state."""
    from irgdistill.io.metrics_file import records
    from irgdistill.io.tensors import read_tensors
    from irgdistill.training.state import load_state

    found: dict[str, Any] = {}
    for name in ("best", "last"):
        weights, metadata = read_tensors(folder / f"{name}.safetensors")
        found |= {f"{name} {key}": value for key, value in _flat(weights).items()}
        found |= {f"{name} metadata {key}": value for key, value in _flat(metadata).items()}
    for number, record in enumerate(records(folder / "metrics.jsonl")):
        found |= {f"metrics {number} {key}": value for key, value in _flat(record).items()}
    found |= {
        f"summary {key}": value for key, value in _flat(json.loads((folder / "summary.json").read_text())).items()
    }
    state = load_state(folder / "state" / "state.safetensors")
    state["metrics_mark"] = state.pop("metrics")  # its bytes hold times
    found |= {f"state {key}": value for key, value in _flat(state).items()}
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names under which two outcomes differ in any bit."""
    names = [name for name in one.keys() & other.keys() if one[name] != other[name]]
    return sorted(names + list(one.keys() ^ other.keys()))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if hasattr(value, "numpy"):
        return {name: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())}
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if key not in TIMES]
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {name: value}
    return {key: leaf for part, item in items for key, leaf in _flat(item, f"{name}.{part}".lstrip(".")).items()}


def passing(point: Callable[[str], None]) -> None:
    """Call `point` with the name of every place of interest that this process passes from now on."""
    from irgdistill.io import tensors
    from irgdistill.training import evaluation, trainer

    def around(function: Any, name: Callable[..., str]) -> Any:
        def passed(*args: Any, **options: Any) -> Any:
            point(f"{name(*args)} before")
            result = function(*args, **options)
            point(f"{name(*args)} after")
            return result

        return passed

    os.replace = around(os.replace, lambda _, path: f"replace {Path(path).name}")
    os.link = around(os.link, lambda _, path: f"link {Path(path).name}")
    tensors.save_file = around(tensors.save_file, lambda _, path: f"write {Path(path).name}")
    trainer.evaluate = around(trainer.evaluate, lambda *_: "evaluate")
    trainer.Trainer.train_step = around(trainer.Trainer.train_step, lambda *_: "step")  # type: ignore[method-assign]
    trainer.Trainer.update_weights = around(trainer.Trainer.update_weights, lambda *_: "update")  # type: ignore[method-assign]
    evaluation._batch_sums = around(evaluation._batch_sums, lambda *_: "evaluated batch")


def run_jobs(jobs: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Run commands one after the other, each in a process forked from this one, which has trained nothing.

    A job is {"arguments": [...], "at": point, "nth": n, "signal": number, "group": bool}; it gets the signal at the
    n-th passage of a point such as "replace best.safetensors before". Returns exit codes and texts on stderr.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return [_run_job(job) for job in jobs]


def _run_job(job: dict[str, Any]) -> tuple[int, str]:
    """Exit code (negative: of a signal nobody caught) and stderr of one command in a forked process."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(output.fileno(), 2)
            os._exit(_run_here(job))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read()


def _run_here(job: dict[str, Any]) -> int:
    import torch

    from irgdistill.cli.app import main

    torch.set_num_threads(1)
    left = job.get("nth", 1)

    def point(name: str) -> None:
        nonlocal left
        left -= name == job["at"]
        if name == job["at"] and left == 0:
            (os.killpg if job.get("group") else os.kill)(os.getpid(), job.get("signal", signal.SIGKILL))

    if "at" in job:
        passing(point)
    sys.argv = ["irgdistill", *job["arguments"]]
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.stderr.flush()
    return 0
