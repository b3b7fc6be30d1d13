"""`--gpus` and torchrun: workers refused, started, stopped, killed and resumed, through the real command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from irgdistill.models.build import build_network

pytestmark = pytest.mark.timeout(600)
DISTILL = ("distill", "--data", "digits", "--student", "cifar_resnet14_x0_5", "--device", "cpu", "--workers", "0")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "2", "--backend", "gloo", "--batch-size", "127"], ["127", "126 or 128"]),
        (["--gpus", "2", "--backend", "gloo", "--batch-size", "6", "--mixup", "0.2"], ["in pairs", "4 or 8"]),
        (["--gpus", "two", "--backend", "gloo"], ["--gpus two", "or all"]),
        (["--gpus", "0", "--backend", "gloo"], ["--gpus 0"]),
        (["--gpus", "2", "--backend", "goo"], ["--backend goo", "did you mean gloo?"]),
        (["--graph-scope", "locale"], ["runtime.graph_scope", "'local'"]),
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


def _command(*args: object) -> list[str]:
    return [sys.executable, "-m", "irgdistill", *DISTILL, *map(str, args)]


def _torchrun(*args: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    return [*launcher, "-m", "irgdistill", *DISTILL, *map(str, args)]


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "STARTED_BY": str(os.getpid())},
        start_new_session=True,
    )


def _wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    for _ in range(1200):
        if found := condition():
            return found
        if process.poll() is not None:
            pytest.fail(f"ended early with {process.returncode}: {process.communicate()}")
        time.sleep(0.1)
    raise TimeoutError


def _worker(rank: int) -> int | None:
    """Process number of a worker that this test started, found by its environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if {f"STARTED_BY={os.getpid()}", f"RANK={rank}"} <= set(path.read_text().split("\0")):
                return int(path.parent.name)
        except (OSError, UnicodeDecodeError):
            continue
    return None


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
    flags = ["--gpus", "2", "--backend", "gloo"]
    first = ["--method", "none", "--epochs", "2", "--set", "runtime.log_every=2", "--output", folder]
    process = _start(_command(*first, *flags))
    _wait_for(lambda: _records(folder), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: launcher and workers all get it
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, (out, err)
    assert "2 processes share batches of 128 images; relations span all 128" in err
    assert err.count("stopped at") == 1 and err.rstrip().endswith(f"--resume {folder}") and "Traceback" not in err
    again = [sys.executable, "-m", "irgdistill", "distill", "--resume", str(folder), *flags]
    result = subprocess.run(again, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stderr and (folder / "summary.json").exists()
    assert set(load_file(folder / "best.safetensors")) == set(
        build_network("cifar_resnet14_x0_5", num_classes=10).model.state_dict()
    )


@pytest.mark.slow
def test_a_worker_says_once_why_it_failed(tmp_path: Path, blind_teacher: Path) -> None:
    teacher = ["--teacher", "cifar_resnet14_x0_5", "--teacher-checkpoint", blind_teacher]
    command = _command("--gpus", "2", "--backend", "gloo", "--output", tmp_path / "run", *teacher)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("--skip-teacher-check") == 1 and "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = _start(_command("--gpus", "2", "--backend", "gloo", "--method", "none", "--output", folder))
    _wait_for(lambda: (folder / "state").exists() and any((folder / "state").iterdir()), process)
    os.kill(_wait_for(lambda: _worker(1), process), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 137 and "worker 1 was killed by SIGKILL" in err and "Traceback" not in err, err


@pytest.mark.slow
def test_a_worker_killed_under_torchrun_resumes_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ["--method", "none", "--epochs", "2", "--set", "runtime.log_every=2", "--output", folder]
    process = _start(_torchrun(*more))
    _wait_for(lambda: _records(folder), process)
    os.kill(_wait_for(lambda: _worker(1), process), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "resuming" in err and (folder / "summary.json").exists()
