"""`--gpus` and torchrun: workers refused, started, stopped, killed and resumed, through the real command."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processes import Command

from irgdistill.errors import UserError
from irgdistill.io import RunFolder
from irgdistill.models.build import build_network

pytestmark = pytest.mark.timeout(600)
GLOO = ("--gpus", 2, "--backend", "gloo")
DISTILL = ("distill", "--data", "digits", "--student", "cifar_resnet14_x0_5", "--device", "cpu", "--workers", "0")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "2", "--backend", "gloo", "--batch-size", "127"], ["127", "126 or 128"]),
        (["--gpus", "2", "--backend", "gloo", "--batch-size", "6", "--mixup", "0.2"], ["in pairs", "4 or 8"]),
        (["--gpus", "two", "--backend", "gloo"], ["--gpus two", "or all"]),
        (["--gpus", "0", "--backend", "gloo"], ["--gpus 0"]),
        (["--gpus", "2", "--backend", "goo"], ["--backend goo", "did you mean gloo?"]),
        (["--graph-scope", "locale"], ["--graph-scope locale: expected", "'local'"]),
    ],
)
def test_refused_before_a_worker_starts(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: list[str]
) -> None:
    monkeypatch.setattr("irgdistill.commands.distill.run_workers", lambda *_: pytest.fail("a worker was started"))
    result = run(*DISTILL, "--method", "none", "--output", tmp_path / "run", *flags)
    assert result.code == 2 and result.err.count("\n") == 1
    assert all(word in result.err for word in words), result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
@pytest.mark.parametrize("flags", [["--gpus", "2"], ["--gpus", "all"], ["--backend", "nccl"]])
def test_gpus_that_are_not_there(run: Callable[..., Any], tmp_path: Path, flags: list[str]) -> None:
    result = run(*DISTILL[:-4], "--method", "none", "--output", tmp_path / "run", *flags)
    assert result.code == 2 and "GPU" in result.err and "--backend gloo" in result.err and result.err.count("\n") == 1


# --- real workers -----------------------------------------------------------------------------------------------------


def _wait_for(condition: Callable[[], Any], process: Command) -> Any:
    for _ in range(1200):
        if found := condition():
            return found
        if process.poll() is not None:
            pytest.fail(f"ended early with {process.poll()}: {process.end()}")
        time.sleep(0.1)
    raise TimeoutError


def _records(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


@pytest.fixture(scope="module")
def blind_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(build_network("cifar_resnet14_x0_5", num_classes=10).model.state_dict(), path)
    return path


@pytest.mark.slow
def test_two_workers_stop_go_on_and_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = ["--method", "none", "--epochs", 2, "--set", "runtime.log_every=2", "--output", folder]
    process = Command(tmp_path, *DISTILL, *first, *GLOO, fork=False)
    _wait_for(lambda: _records(folder), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: launcher and workers all get it
    code, out, err = process.end()
    assert code == 130, (out, err)
    assert "2 processes share batches of 128 images; relations span all 128" in err
    assert err.count("stopped at") == 1 and err.rstrip().endswith(f"--resume {folder}") and "Traceback" not in err
    code, out, err = Command(tmp_path, "distill", "--resume", folder, *GLOO).end()
    assert code == 0, (out, err)
    assert "resuming" in err and (folder / "summary.json").exists()
    assert set(load_file(folder / "best.safetensors")) == set(
        build_network("cifar_resnet14_x0_5", num_classes=10).model.state_dict()
    )


@pytest.mark.slow
def test_a_worker_says_once_why_it_failed(tmp_path: Path, blind_teacher: Path) -> None:
    teacher = ["--teacher", "cifar_resnet14_x0_5", "--teacher-checkpoint", blind_teacher]
    code, _, err = Command(tmp_path, *DISTILL, *GLOO, "--output", tmp_path / "run", *teacher).end()
    assert code == 2, err
    assert err.count("--skip-teacher-check") == 1 and "Traceback" not in err


@pytest.mark.slow
def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = Command(tmp_path, *DISTILL, *GLOO, "--method", "none", "--output", folder)
    _wait_for(lambda: (folder / "state").exists() and any((folder / "state").iterdir()), process)
    os.kill(_wait_for(lambda: process.worker(1), process), signal.SIGKILL)
    code, _, err = process.end()
    assert code == 137 and "worker 1 was killed by SIGKILL" in err and "Traceback" not in err, err


def _gone(pid: int) -> bool:
    """Whether a process has ended; nobody may be there to ask for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("command", ["distill", "compare"])
def test_what_a_killed_command_started_ends_with_it(tmp_path: Path, command: str) -> None:
    words: tuple[object, ...] = (*DISTILL, "--method", "none", *GLOO, "--output", tmp_path / "run")
    folder = tmp_path / "run"
    if command == "compare":
        words = ("compare", *DISTILL[1:], "--methods", "none", "--seeds", 2, "--jobs", 2, "--output", tmp_path / "cmp")
        folder = tmp_path / "cmp/none/0"
    process = Command(tmp_path, *words)
    _wait_for((folder / "state/state.safetensors").exists, process)
    children = [_wait_for(lambda rank=rank: process.worker(rank), process) for rank in (0, 1)]
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not all(map(_gone, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(_gone, children))
    while True:  # their last threads may still be ending, and with them the lock
        try:
            return RunFolder(folder).lock()  # not in use: can be resumed
        except UserError:
            assert time.monotonic() < deadline, "the run folder is still locked"
            time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_killed_under_torchrun_resumes_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ["--method", "none", "--epochs", 2, "--set", "runtime.log_every=2", "--output", folder]
    torchrun = ("--nproc-per-node", 2, "--max-restarts", 2, "-m", "irgdistill", *DISTILL, *more)
    process = Command(tmp_path, *torchrun, module="torch.distributed.run")
    _wait_for(lambda: _records(folder), process)
    os.kill(_wait_for(lambda: process.worker(1), process), signal.SIGKILL)
    code, _, err = process.end()
    assert code == 0, err
    assert "resuming" in err and (folder / "summary.json").exists()
