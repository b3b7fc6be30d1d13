"""`irgdistill compare --together`: methods in turns on the same batches, with the results that each has alone."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import Run, command, interrupted
from torch import nn

from irgdistill.data import KeptLoader, TurnLoader
from irgdistill.matching import Output
from irgdistill.training import LiveTeacher
from irgdistill.training.shared import RememberingView
from irgdistill.training.state import load_state

RECIPE = ("--preset", "quickstart", "--student", "cifar_resnet14_x0_5", "--epochs", 2, "--batch-size", 64)
RECIPE += (
    "--warmup-epochs",
    0,
    "--device",
    "cpu",
    "--set",
    "data.train_images=256",
    "--set",
    "losses.crd.negatives=64",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert command("distill", *RECIPE, "--method", "none", "--output", folder) == 0
    return folder / "last.safetensors"


def check_equal(output: Path, alone: Path, methods: str) -> None:
    """Weights and metrics of each method are the same in both comparisons, bit for bit."""
    for method in methods.split(","):
        one, other = (load_file(folder / method / "0" / "last.safetensors") for folder in (output, alone))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), method
        states = (folder / method / "0" / "state" / "state.safetensors" for folder in (output, alone))
        ours, theirs = map(load_state, states)
        assert {**ours["last"], "images_per_second": 0} == {**theirs["last"], "images_per_second": 0}
        assert ours["best"]["epoch"] == theirs["best"]["epoch"]


def test_runs_in_turns_are_those_alone_also_after_an_interruption(
    run: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mixup, which draws random numbers in each step. A signal in the second run's turn stops all three."""
    methods = "none,kd,irg+kd+at"
    options = (*RECIPE, "--mixup", 0.3, "--teacher-checkpoint", teacher, "--skip-teacher-check", "--seeds", 1)
    assert run("compare", "--methods", methods, *options, "--output", tmp_path / "alone").code == 0
    together = ("compare", "--methods", methods, *options, "--together", "--output", tmp_path / "out")
    with interrupted(lambda trainer: trainer.progress.update == 5 and trainer.config.method == "irg+kd+at"):
        stopped = run(*together)
    assert stopped.code == 130 and "repeat the `compare` command" in stopped.err
    states = [load_state(path) for path in tmp_path.glob("out/*/0/state/state.safetensors")]
    assert [(state["epoch"], state["batch"], state["update"]) for state in states] == [(1, 2, 6)] * 3
    finished = run(*together)
    assert finished.code == 0, finished.err
    assert finished.err.count("resuming") == 3 and "[1 to 3 of 3] kd, seed 0; irg+kd+at, seed 0; none" in finished.err
    check_equal(tmp_path / "out", tmp_path / "alone", methods)


def test_images_teacher_and_cache_are_read_once(
    run: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods, calls = "none,kd,dkd,crd", Counter[str]()
    options = (*RECIPE, "--seeds", 1, "--methods", methods)
    live = ("--teacher-checkpoint", teacher, "--skip-teacher-check")
    for cls, name in ((TurnLoader, "_load"), (LiveTeacher, "_run"), (KeptLoader, "_read")):
        whole = getattr(cls, name)

        def counted(self: Any, *args: Any, name: str = name, whole: Any = whole) -> Any:
            calls[name] += 1
            return whole(self, *args)

        monkeypatch.setattr(cls, name, counted)
    assert run("compare", *options, *live, "--together", "--output", tmp_path / "out").code == 0
    batches, taps = 2 * 4, 2  # of two epochs; kd and dkd tap nothing, crd the last stage
    assert calls == {"_load": batches, "_run": taps * batches, "_read": 1}

    caching = ("cache-teacher", *RECIPE, "--teacher-checkpoint", teacher, "--method", "crd")
    assert run(*caching, "--views", 1, "--output", tmp_path / "cache").code == 0
    cached = ("--teacher-cache", tmp_path / "cache", "--together", "--output", tmp_path / "both")
    assert run("compare", *options, *cached).code == 0
    assert run("compare", *options, *cached[:2], "--output", tmp_path / "one").code == 0
    check_equal(tmp_path / "both", tmp_path / "one", methods)


def test_what_does_not_go_together_is_refused(run: Run, teacher: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--jobs", 2), "--together trains all methods in one process; leave out --jobs 2"),
        (("--log", "tensorboard"), "--log tensorboard follows one run at a time"),
    ):
        result = run("compare", *RECIPE, "--teacher-checkpoint", teacher, "--together", *options, "--output", tmp_path)
        assert result.code == 2 and message in result.err


class Loader:
    """Epochs of `count` batches, each of 100 bytes."""

    def __init__(self, count: int) -> None:
        self.images, self.device, self.count = count, torch.device("cpu"), count
        self.opened: list[tuple[int, int]] = []

    def epoch(self, epoch: int = 0, start: int = 0) -> Any:
        self.opened.append((epoch, start))
        for number in range(start, self.count):
            yield torch.full((100,), 10 * epoch + number, dtype=torch.uint8), torch.zeros(0)

    def __len__(self) -> int:
        return self.count


def test_a_batch_is_loaded_by_the_first_run_and_kept_for_the_others() -> None:
    loader = Loader(3)
    shared: Any = TurnLoader(loader)  # type: ignore[arg-type]
    runs = [shared.epoch(2, start=1) for _ in range(3)]
    rounds = [[next(run)[0] for run in runs] for _ in range(2)]
    assert all(batch is turn[0] for turn in rounds for batch in turn)
    assert [int(turn[0][0]) for turn in rounds] == [21, 22] and loader.opened == [(2, 1)]
    assert [next(run, None) for run in runs] == [None] * 3 and len(shared) == 3
    assert [int(batch[0][0]) for batch in shared.epoch(3)] == [30, 31, 32] and loader.opened == [(2, 1), (3, 0)]


def test_a_run_that_is_a_turn_behind_loads_nothing_again() -> None:
    loader = Loader(3)
    shared: Any = TurnLoader(loader)  # type: ignore[arg-type]
    ahead, late = ((batch for epoch in (0, 1) for batch in islice(shared.epoch(epoch), 3)) for _ in "ab")
    seen = [int(next(ahead)[0][0])]
    for _ in range(5):
        seen += [int(next(ahead)[0][0]), int(next(late)[0][0])]
    assert seen == [0, 1, 0, 2, 1, 10, 2, 11, 10, 12, 11] and loader.opened == [(0, 0), (1, 0)]


@pytest.mark.parametrize(("gib", "reads"), [(300 / 2**30, 1), (299 / 2**30, 3)])
def test_validation_batches_are_kept_if_they_fit(gib: float, reads: int) -> None:
    loader = Loader(3)
    kept: Any = KeptLoader(loader, gib)  # type: ignore[arg-type]
    seen = [[int(batch[0][0]) for batch in kept.epoch()] for _ in range(3)]
    assert seen == [[0, 1, 2]] * 3 and len(loader.opened) == reads


def test_a_teacher_and_a_view_remember_the_last_images_alone() -> None:
    network: Any = lambda images: Output(images.sum(1), {})  # noqa: E731
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    teacher = LiveTeacher(network, remembers=True)
    first = teacher(one)
    assert teacher(one) is first and teacher(one.clone()) is not first
    assert teacher(other).logits.tolist() == [0, 0] and teacher(one) is not first
    view = RememberingView(nn.ReLU())
    flat = view(one)
    assert view(one) is flat and view(other) is not flat and view(one) is not flat
    forgetful = LiveTeacher(network)
    assert forgetful(one) is not forgetful(one)
