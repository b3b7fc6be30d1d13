"""Runs that are killed, stopped, damaged or out of disk: they end where an undisturbed run ends, or say why not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from support import Result, Run, write_images
from support.interruption import differences, outcome, run_jobs
from support.processes import forked

import irgdistill.training.evaluation
from irgdistill.commands import distill as run_module
from irgdistill.io import atomic, metrics_file
from irgdistill.io import tensors as files
from irgdistill.io.metrics_file import records
from irgdistill.io.run_folder import RunFolder
from irgdistill.training.checkpointing import Checkpointer
from irgdistill.training.state import SavedState, load_state, position, save_state
from irgdistill.training.trainer import Trainer

OPTIONS = ("--method", "none", "--student", "cifar_resnet14_x0_5", "--input-size", 16, "--workers", 0, "--epochs", 3)
OPTIONS += ("--batch-size", 12, "--set", "runtime.log_every=1", "--device", "cpu", "--save-every-steps", 2)
BATCHES = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of six updates that nothing disturbed; its images beside it."""
    from irgdistill.cli.app import main

    root = tmp_path_factory.mktemp("whole")
    write_images(root / "data" / "train", {"red": 24, "green": 24, "blue": 24})
    write_images(root / "data" / "val", {"red": 8, "green": 8, "blue": 8}, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["irgdistill", *map(str, command(root / "data", root / "run"))])
        with pytest.raises(SystemExit, match="0"):
            main()
    return root / "run"


def command(data: Path, output: Path) -> tuple[object, ...]:
    return ("distill", "--data", data, *OPTIONS, "--output", output)


@pytest.fixture
def begin(run: Run, whole: Path, tmp_path: Path) -> Callable[..., Result]:
    """Begins the same run in tmp_path/run."""
    return lambda *options: run(*command(whole.parent / "data", tmp_path / "run"), *options)


def on_call(patch: pytest.MonkeyPatch, owner: Any, name: str, actions: dict[int, Callable[[], object]]) -> None:
    """Before the n-th call of `owner.name`, do `actions[n]`."""
    function, calls = getattr(owner, name), iter(range(1, 10**6))

    def counted(*args: Any, **options: Any) -> Any:
        actions.get(next(calls), lambda: None)()
        return function(*args, **options)

    patch.setattr(owner, name, counted, raising=False)


def send(number: int, times: int = 1) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), number) for _ in range(times)] and None


def one_line(result: Result, code: int) -> str:
    """The last line of stderr, after the exit code and the absence of a traceback are checked."""
    lines = result.err.strip().splitlines()
    assert result.code == code, result.err
    assert lines[-1].startswith("irgdistill: ") and "Traceback" not in result.err
    return lines[-1]


def temporary(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith(".tmp")]


def ends_like(whole: Path, folder: Path) -> bool:
    assert differences(outcome(whole), outcome(folder)) == [] and not temporary(folder)
    return True


# --- killed -----------------------------------------------------------------------------------------------------------

KILLS = [
    ("write state.safetensors after", 1),  # the first state is complete, but has no name yet
    ("replace state.safetensors after", 1),  # there is a state, but no config.yaml
    ("link previous.safetensors after", 2),
    ("replace best.safetensors after", 1),  # newer than the state; of the first epoch, which is the best so far
    ("replace state.safetensors before", 2),  # the previous state is the current one
    ("step before", 3),
    ("evaluate after", 1),
    ("evaluated batch before", 2),
    ("replace last.safetensors before", 1),
    ("write state.safetensors before", 1),
    ("replace summary.json before", 1),  # trained to the end
]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bit_for_bit_like_one_that_was_not(tmp_path: Path) -> None:
    """A distillation, killed with SIGKILL in saves, steps, evaluations, and once by SIGTERM to it and its loader."""
    common = ["distill", "--preset", "quickstart", "--device", "cpu", "--epochs", 2]
    common += ["--input-size", 8, "--teacher-input-size", 8, "--batch-size", 16, "--val-fraction", 0.1]
    common += ["--set", "data.train_images=230", "--set", "data.eval_batch_size=64"]
    teacher = [*common, "--method", "none", "--student", "cifar_resnet20", "--output", tmp_path / "teacher"]
    student = [*common, "--teacher-checkpoint", tmp_path / "teacher/best.safetensors"]
    student += [
        "--student",
        "cifar_resnet14_x0_5",
        "--ema",
        0.9,
        "--accumulate",
        2,
        "--save-every-steps",
        3,
        "--lr",
        0.01,
    ]
    resume: list[object] = ["distill", "--resume", tmp_path / "killed"]
    jobs: list[dict[str, Any]] = [
        {"arguments": teacher},
        {"arguments": [*student, "--output", tmp_path / "whole"]},
        {"arguments": [*student, "--output", tmp_path / "never"], "at": "evaluated batch before", "signal": 15},
    ]
    for number, (at, nth) in enumerate(KILLS):
        arguments = [*student, "--output", tmp_path / "killed"] if number < 2 else resume
        jobs.append({"arguments": arguments, "at": at, "nth": nth})
    jobs.insert(
        -1, {"arguments": [*resume, "--workers", 1], "at": "step before", "nth": 2, "signal": 15, "group": True}
    )
    jobs += [{"arguments": resume}, {"arguments": resume}]
    for job in jobs:
        job["arguments"] = list(map(str, job["arguments"]))
    results = forked(tmp_path, run_jobs, jobs)
    expected = [0, 0, 143, *[-signal.SIGKILL] * (len(KILLS) - 1), 143, -signal.SIGKILL, 0, 2]
    assert [code for code, _ in results] == expected, results
    assert results[2][1].endswith("stopped by SIGTERM; nothing was trained yet\n") and not (tmp_path / "never").exists()
    assert "all saved" in results[-4][1] and "DataLoader" not in results[-4][1]
    assert "holds a finished run" in results[-1][1]
    assert ends_like(tmp_path / "whole", tmp_path / "killed")


# --- stopped by signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once_and_loses_nothing(
    begin: Run, run: Run, whole: Path, tmp_path: Path, number: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, Trainer, "train_step", {9: send(number, times=2)})
        line = one_line(begin(), 128 + number)
    assert f"stopped by {signal.Signals(number).name}; what was saved is safe; resume with:" in line
    assert SavedState.read(RunFolder(tmp_path / "run").state).position == "epoch 2, batch 2"
    assert run("distill", "--resume", tmp_path / "run").code == 0 and ends_like(whole, tmp_path / "run")


def test_a_second_signal_while_saving_leaves_the_state_before(
    begin: Run, run: Run, whole: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        saving = {1: lambda: on_call(patch, atomic, "sync", {1: send(signal.SIGTERM)})}
        on_call(patch, Trainer, "train_step", {9: lambda: (send(signal.SIGINT)(), saving[1]())})
        line = one_line(begin(), 143)
    assert "stopped by SIGTERM" in line and not temporary(tmp_path / "run")
    assert run("distill", "--resume", tmp_path / "run").code == 0 and ends_like(whole, tmp_path / "run")


def test_a_signal_in_evaluation_stops_there_and_trains_nothing_twice(
    begin: Run, run: Run, whole: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, irgdistill.training.evaluation, "_batch_sums", {2: send(signal.SIGTERM)})
        line = one_line(begin(), 143)
    assert f"stopped at epoch 2, batch {BATCHES} of {BATCHES}, all saved; resume with:" in line
    with pytest.MonkeyPatch.context() as patch:
        steps: list[int] = []
        on_call(patch, Trainer, "train_step", {n: lambda: steps.append(1) for n in range(1, 100)})
        assert run("distill", "--resume", tmp_path / "run").code == 0
    assert len(steps) == BATCHES and ends_like(whole, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_leaves_nothing(begin: Run, tmp_path: Path, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, run_module, "prepare", {1: send(number)})
        assert one_line(begin(), 128 + number).endswith("nothing was trained yet")
    assert not (tmp_path / "run").exists()


def test_a_signal_while_a_resumed_run_is_built_leaves_it_as_it_was(run: Run, stopped: Path) -> None:
    before = outcome_of_state(stopped)
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, run_module, "prepare", {1: send(signal.SIGTERM)})
        assert "what was saved is safe" in one_line(run("distill", "--resume", stopped), 143)
    assert outcome_of_state(stopped) == before


# --- no room left -----------------------------------------------------------------------------------------------------


def full(number: int = errno.ENOSPC, native: bool = False) -> Callable[[], None]:
    def fail() -> None:
        if native:  # how safetensors says it
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(("number", "native"), [(errno.ENOSPC, True), (errno.EDQUOT, False)])
def test_saves_that_fail_for_a_while_change_nothing_in_the_end(
    begin: Run, whole: Path, tmp_path: Path, number: int, native: bool
) -> None:
    """From the first epoch's end into the second, no file can be written: told once, the best weights still arrive."""
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, files, "save_file", dict.fromkeys(range(5, 8), full(number, native)))
        result = begin()
    assert result.code == 0, result.err
    assert result.err.count("warning: not saved") == 1 and os.strerror(number) in result.err
    assert "the last saved state is epoch 1, batch 6; training continues" in result.err
    assert result.err.count("warning: saved again: the last saved state is epoch 2, batch") == 1
    assert ends_like(whole, tmp_path / "run")


def test_metrics_that_cannot_be_written_for_a_while_arrive_later(begin: Run, whole: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_file, "open", open, raising=False)
        on_call(patch, metrics_file, "open", dict.fromkeys(range(4, 9), full()))
        result = begin()
    assert result.code == 0, result.err
    assert result.err.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert ends_like(whole, tmp_path / "run")


def test_a_last_save_that_fails_says_what_is_there_and_can_be_made_up(
    begin: Run, run: Run, whole: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, files, "save_file", dict.fromkeys(range(14, 99), full()))
        line = one_line(begin(), 2)
    assert "trained to the end, but not all is saved (No space left on device" in line
    assert (
        "the last saved state is epoch 3, batch" in line
        and "free some space, then: irgdistill distill --resume" in line
    )
    assert not (tmp_path / "run/summary.json").exists() and not temporary(tmp_path / "run")
    assert run("distill", "--resume", tmp_path / "run").code == 0 and ends_like(whole, tmp_path / "run")


def test_a_stop_that_cannot_be_saved_says_so(begin: Run, run: Run, whole: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, Trainer, "train_step", {9: send(signal.SIGTERM)})
        on_call(patch, files, "save_file", dict.fromkeys(range(9, 99), full()))
        line = one_line(begin(), 143)
    assert "stopped at epoch 2, batch 3 of 6, but this could not be saved (No space left" in line
    assert "the last saved state is epoch 2, batch 2; resume with:" in line
    assert run("distill", "--resume", tmp_path / "run").code == 0 and ends_like(whole, tmp_path / "run")


def test_a_run_that_cannot_save_its_first_state_does_not_begin(begin: Run, whole: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, files, "save_file", {1: full()})
        assert "No space left on device" in one_line(begin(), 2)
    assert begin().code == 0 and ends_like(whole, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_for_a_while(run: Run, whole: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"

    def fill() -> None:
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC

    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, Trainer, "train_step", {4: fill, 15: filler.unlink})
        result = run(*command(whole.parent / "data", small_disk / "run"))
    assert result.code == 0, result.err
    assert result.err.count("warning: not saved (No space left on device") == 1
    assert ends_like(whole, small_disk / "run")


# --- damaged ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_once(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped in the middle of the second epoch, with two states and all other files but a summary."""
    from irgdistill.cli.app import main

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["irgdistill", *map(str, command(whole.parent / "data", folder))])
        on_call(patch, Trainer, "train_step", {9: send(signal.SIGTERM)})
        with pytest.raises(SystemExit):
            main()
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


def outcome_of_state(folder: Path) -> bytes:
    return RunFolder(folder).state.read_bytes()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "cut":
        del data[len(data) // 2 :]
    else:
        data[{"flipped in the middle": len(data) // 2, "flipped at the start": 20}[how]] ^= 4
    path.write_bytes(data)


DAMAGE = ["deleted", "cut", "flipped in the middle", "flipped at the start"]
OFFERED = "the state before it is whole (epoch 2, batch 2): irgdistill distill --resume"
RESUMED = {
    "state/state.safetensors": (2, OFFERED),
    "state/previous.safetensors": (0, ""),
    "config.yaml": (2, "correct it, or delete it to use the configuration in the state"),
    "config.json": (0, ""),
    "metrics.jsonl": (0, "metrics.jsonl is missing, cut short or changed since the state was saved"),
    "best.safetensors": (0, "of epoch 1 is lost with it"),
    "last.safetensors": (0, ""),
}
"""What --resume does when this file is damaged, and says."""


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", RESUMED)
def test_a_damaged_file_is_named_or_made_up_for(run: Run, whole: Path, stopped: Path, name: str, how: str) -> None:
    code, message = RESUMED[name]
    if (name, how) == ("config.yaml", "deleted"):
        code, message = 0, ""
    damage(stopped / name, how)
    result = run("distill", "--resume", stopped)
    if code:
        assert message in one_line(result, code) and name in one_line(result, code)
        assert result.err.count("\n") == 1
        if name == "config.yaml":
            return
        result = run("distill", "--resume", stopped, "--previous-state")
    elif message:
        assert result.err.count("warning: ") == 1 and message in result.err
    assert result.code == 0, result.err
    allowed = {"metrics.jsonl": "metrics ", "best.safetensors": "best "}.get(name, "nothing")
    different = differences(outcome(whole), outcome(stopped))
    assert all(entry.startswith((allowed, "summary", "state best")) and allowed != "nothing" for entry in different)


def test_a_damaged_record_is_left_out(tmp_path: Path) -> None:
    whole = '{"kind": "eval", "epoch": 1}'
    (tmp_path / "metrics.jsonl").write_bytes(f'{whole}\n{{&kind": "eval"}}\n7\n{whole}\n'.encode() + b'{"kind": "\xff')
    assert records(tmp_path / "metrics.jsonl") == 2 * [json.loads(whole)]
    assert records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["best.safetensors", "state/state.safetensors", "config.yaml", "summary.json"])
def test_eval_of_a_damaged_run(run: Run, whole: Path, tmp_path: Path, name: str, how: str) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    damage(folder / name, how)
    result = run("eval", folder, "--json")
    if name != "best.safetensors":  # eval needs the weights alone
        assert result.code == 0
    elif how == "deleted":
        assert result.code == 0 and "holds no best.safetensors; using last.safetensors" in result.err
    else:
        assert "best.safetensors" in one_line(result, 2) and result.err.count("\n") == 1


@pytest.mark.parametrize("name", ["best", "last"])
def test_weights_of_the_epoch_just_ended_are_written_again(
    begin: Run, run: Run, whole: Path, tmp_path: Path, name: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, Trainer, "end_epoch", {2: send(signal.SIGTERM)})
        assert "stopped at epoch 3, batch 0 of 6, all saved" in one_line(begin(), 143)
    (tmp_path / "run" / f"{name}.safetensors").unlink()
    result = run("distill", "--resume", tmp_path / "run")
    assert result.code == 0 and "warning" not in result.err and ends_like(whole, tmp_path / "run")


def test_without_any_good_state_the_run_says_so_and_can_be_begun_again(
    begin: Run, run: Run, whole: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, Trainer, "train_step", {9: send(signal.SIGTERM)})
        begin()
    for name in ("state", "previous"):
        damage(tmp_path / "run/state" / f"{name}.safetensors", "cut")
    for option in ((), ("--previous-state",)):
        assert "there is no other state to resume from" in one_line(
            run("distill", "--resume", tmp_path / "run", *option), 2
        )
    assert "--overwrite to replace it" in one_line(begin(), 2)
    assert begin("--overwrite").code == 0 and ends_like(whole, tmp_path / "run")


# --- another run, other data, another process -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ("name: cifar_resnet14_x0_5", "name: cifar_resnet20", "student.name = cifar_resnet20, was cifar_resnet14_x0_5"),
        ("name: sgd", "name: adamw", "optim.name = adamw, was sgd"),
        ("levels: null", "levels: 2", "matching.levels = 2, was None"),
        ("epochs: 3", "epochs: 4", "schedule.epochs = 4, was 3"),
    ],
)
def test_an_edited_configuration_is_named(
    run: Run, whole: Path, stopped: Path, before: str, after: str, key: str
) -> None:
    text = (stopped / "config.yaml").read_text()
    assert before in text
    (stopped / "config.yaml").write_text(text.replace(before, after, 1))
    line = one_line(run("distill", "--resume", stopped), 2)
    assert key in line and "correct it, or delete it" in line
    (stopped / "config.yaml").unlink()
    assert run("distill", "--resume", stopped).code == 0 and ends_like(whole, stopped)
    assert (stopped / "config.yaml").read_text() == text


def test_a_state_that_does_not_fit_the_networks_is_named(run: Run, stopped: Path) -> None:
    state = load_state(RunFolder(stopped).state)
    state["student"].popitem()
    save_state(RunFolder(stopped).state, state)
    line = one_line(run("distill", "--resume", stopped), 2)
    assert "does not fit the run's networks: " in line and "Missing key" in line and OFFERED in line


def test_a_state_of_a_newer_version_is_named(run: Run, stopped: Path) -> None:
    files.save_tensors(RunFolder(stopped).state, {}, {"format": 99, "state": {}})
    line = one_line(run("distill", "--resume", stopped), 2)
    assert "was written by a newer irgdistill (format 99" in line and OFFERED in line


def test_other_data_are_named_and_moved_data_are_not(run: Run, whole: Path, stopped: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(whole.parent / "data", tmp_path / "moved"))
    shutil.copy(moved / "train/red/000.png", moved / "train/red/more.png")
    refused = one_line(run("distill", "--resume", stopped, "--data", moved), 2)
    assert "the data are not those the run was trained on: training images 73, were 72" in refused
    (moved / "train/red/more.png").unlink()
    assert run("distill", "--resume", stopped, "--data", moved).code == 0
    strip = {name for name in outcome(whole) if "data.source" in name or "data source" in name}
    assert set(differences(outcome(whole), outcome(stopped))) <= strip


def test_the_previous_state_on_request_ends_the_same(run: Run, whole: Path, stopped: Path) -> None:
    result = run("distill", "--resume", stopped, "--previous-state")
    assert result.code == 0 and "at epoch 2, batch 2 of 6" in result.err
    assert ends_like(whole, stopped)
    assert "--previous-state needs --resume RUN" in one_line(run("distill", "--previous-state"), 2)


def test_two_processes_do_not_share_a_run(run: Run, begin: Run, stopped: Path) -> None:
    code = "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.lockf(lock, fcntl.LOCK_EX); "
    code += "print('mine', flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-c", code, stopped / "state/lock"]
    other = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"mine\n"
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    busy = f"another process is using {stopped}; wait for it or stop it first"
    assert busy in one_line(run("distill", "--resume", stopped), 2)
    assert busy in one_line(begin("--overwrite", "--output", stopped), 2)
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    other.communicate()
    assert run("distill", "--resume", stopped).code == 0


def test_what_killed_processes_left_is_removed(run: Run, stopped: Path) -> None:
    for path in (stopped, stopped / "state"):
        (path / ".x.safetensors.99.tmp").mkdir()
        (path / ".x.safetensors.99.tmp" / "half").write_text("x")
    assert run("distill", "--resume", stopped).code == 0 and not temporary(stopped)


def test_before_the_first_state_there_is_nothing_to_resume(run: Run, begin: Run, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run/state/.state.safetensors.99.tmp").mkdir(parents=True)
    (tmp_path / "run/state/lock").touch()
    line = one_line(run("distill", "--resume", tmp_path / "run"), 2)
    assert "was stopped before its first update; run the command that started it again" in line
    assert begin().code == 0 and ends_like(whole, tmp_path / "run")


def test_unreadable_images_are_remembered(begin: Run, run: Run, whole: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(whole.parent / "data", tmp_path / "broken"))
    (data / "train/red/000.png").write_bytes(b"broken")
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, Trainer, "train_step", {3 * BATCHES: send(signal.SIGTERM)})
        assert "stopped at epoch 3, batch 6 of 6" in one_line(begin("--data", data), 143)
    assert run("distill", "--resume", tmp_path / "run").code == 0
    assert "000.png" in json.loads((tmp_path / "run/summary.json").read_text())["bad_images"][0]


def test_the_clock_saves_too(begin: Run, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        states: list[str] = []
        save = Checkpointer._write_state

        def write(self: Checkpointer, state: dict[str, Any]) -> None:
            states.append(position(state["epoch"], state["batch"]))
            save(self, state)

        patch.setattr(Checkpointer, "_write_state", write)
        assert begin("--save-every-steps", 0, "--save-every-minutes", 1e-9, "--epochs", 1).code == 0
        every_update, states[:] = list(states), []
        assert begin("--save-every-steps", 0, "--save-every-minutes", 60, "--epochs", 1, "--overwrite").code == 0
    assert every_update == [f"epoch 1, batch {n}" for n in range(BATCHES + 1)] + ["epoch 2, batch 0"]
    assert states == ["epoch 1, batch 0", "epoch 2, batch 0"]
