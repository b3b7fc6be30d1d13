"""`irgdistill compare`: what it runs, skips, goes on with and refuses, and the numbers of its table."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import Run, command, interrupted
from support.processes import Command

from irgdistill.commands.compare.curves import curves_figure
from irgdistill.commands.compare.statistics import mean_and_deviation, paired_interval, t_975
from irgdistill.io.tensors import read_metadata, save_tensors
from irgdistill.training import setup

RECIPE = ("--preset", "quickstart", "--student", "cifar_resnet14_x0_5", "--epochs", 1, "--batch-size", 128)
RECIPE += ("--warmup-epochs", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Trained for two epochs through the command line, as options."""

    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert command("distill", *RECIPE, "--epochs", 2, "--method", "none", "--output", folder) == 0
    return ("--teacher-checkpoint", folder / "last.safetensors", "--skip-teacher-check")


def test_a_comparison_opens_data_and_teacher_once(
    run: Run, teacher: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked for each method and trained for each run. The students are those of `distill` bit for bit."""
    calls: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(module, name, counted)

    for name in ("open_splits", "build_teacher", "describe_teacher", "build_student"):
        count(setup, name)
    options = (*RECIPE, *teacher, "--set", "data.train_images=256")
    output = tmp_path / "out"
    result = run("compare", "--methods", "none,kd", "--seeds", 2, "--seed", 3, *options, "--output", output)
    assert result.code == 0, result.err
    assert calls == {"open_splits": 1, "build_teacher": 1, "describe_teacher": 1, "build_student": 2 + 4}
    monkeypatch.undo()
    alone = tmp_path / "alone"
    assert run("distill", "--method", "kd", "--seed", 4, *options, "--output", alone).code == 0
    one, other = (load_file(folder / "last.safetensors") for folder in (output / "kd" / "4", alone))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_comparison_is_run_told_and_not_run_again(
    run: Run, teacher: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods by two seeds; a signal in the third run, after which the same command goes on."""
    output = tmp_path / "out"
    options = (*RECIPE, *teacher, "--set", "losses.kd.fade=[0.5, 1.0]")
    command = ("compare", "--methods", "none,kd", "--seeds", 2, *options, "--seed", 3, "--output", output)
    with interrupted(lambda trainer: trainer.config.seed == 4 and trainer.progress.update == 3):
        stopped = run(*command)
    assert stopped.code == 130 and "repeat the `compare` command" in stopped.err
    done = {path.parent: path.stat().st_mtime_ns for path in output.glob("*/*/summary.json")}
    assert {f"{path.parent.name}/{path.name}" for path in done} == {"none/3", "kd/3"}

    far = run(*command, "--finished", "--json")
    assert far.code == 0, far.err
    assert [row["seeds"] for row in json.loads(far.out)["rows"]] == [[3], [3]]
    assert not (output / "none" / "4" / "summary.json").exists()

    finished = run(*command)
    assert finished.code == 0, finished.err
    assert "resuming" in finished.err and "[3/4] none, seed 4" in finished.err
    assert "paired over seeds" in finished.out and "agreement" in finished.out
    assert all((folder / "summary.json").stat().st_mtime_ns == then for folder, then in done.items())

    result = json.loads((output / "compare.json").read_text())
    assert result["student"] == "cifar_resnet14_x0_5" and result["validation_images"] == 898
    none, kd = result["rows"]
    assert (none["method"], kd["method"]) == ("none", "kd") and kd["seeds"] == [3, 4]
    assert none["weights"] == {"ce": 1.0} and kd["weights"] == {"ce": 1.0, "kd": 1.0}
    assert none["fades"] == {} and kd["fades"] == {"kd": [0.5, 1.0]}
    last = {
        method: [json.loads((output / method / seed / "summary.json").read_text())["last_top1"] for seed in "34"]
        for method in ("none", "kd")
    }
    assert none["top1"] == last["none"] and kd["top1"] == last["kd"]
    assert kd["top1_mean"] == pytest.approx(sum(last["kd"]) / 2)
    assert kd["top1_std"] == pytest.approx(abs(last["kd"][0] - last["kd"][1]) / 2**0.5)
    differences = [a - b for a, b in zip(last["kd"], last["none"], strict=True)]
    assert kd["difference"] == pytest.approx(sum(differences) / 2) and "difference" not in none
    assert kd["half_width_95"] == pytest.approx(12.706 * abs(differences[0] - differences[1]) / 2)
    assert all(0 < value < 100 for value in kd["agreement"]) and kd["seconds"] > 0
    assert [value for (value,) in kd["curves"]] == pytest.approx(last["kd"], rel=1e-6)

    assert (output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    lines = (output / "compare.md").read_text().splitlines()
    assert len(lines) == 6 and lines[4].startswith(f"| none | 2 | {none['top1_mean']:.2f} ± ")
    rows = list(csv.DictReader((output / "compare.csv").open()))
    assert [row["method"] for row in rows] == ["none", "kd"]
    assert float(rows[1]["difference"]) == pytest.approx(kd["difference"])

    shutil.rmtree(output / "none" / "4")
    damaged = output / "kd" / "4" / "metrics.jsonl"
    damaged.write_text(damaged.read_text().replace('"top1"', '"top"'))
    unequal = run(*command, "--finished")
    assert unequal.code == 0, unequal.err
    assert f"warning: {damaged} lacks the top-1 of 1 of 1 epochs: its curve has gaps" in unequal.err
    assert json.loads((output / "compare.json").read_text())["rows"][1]["curves"][1] == [None]
    assert "as far as they are finished" in unequal.out and "paired over images" in unequal.out
    none, kd = json.loads((output / "compare.json").read_text())["rows"]
    assert none["seeds"] == [3] and kd["seeds"] == [3, 4] and kd["top1"] == last["kd"]
    assert kd["difference"] == pytest.approx(differences[0], abs=1e-6)

    one = run(*command[:3], "--seeds", 1, *command[5:])
    assert one.code == 0 and "paired over images" in (output / "compare.md").read_text()
    (row,) = [row for row in json.loads((output / "compare.json").read_text())["rows"] if row["method"] == "kd"]
    assert row["difference"] == pytest.approx(differences[0], abs=1e-6) and row["top1_std"] is None
    assert 0 < row["half_width_95"] < 20

    other = run(*command, "--lr", 0.2)
    assert other.code == 2 and "holds a comparison with other settings (optim.lr = 0.2, was 0.05)" in other.err


def test_a_weight_that_is_set_holds_for_the_methods_with_its_term() -> None:
    from irgdistill.commands.requests import CompareRequest

    flags = {"losses.kd.weight": 0.5, "data.source": "digits", "student.name": "cifar_resnet20"}
    request = CompareRequest(["none"], 1, Path("x"), settings=["losses.edges.weight=2"], flags=flags)
    assert request.config("none").losses.weights()["edges"] == 0 and not request.config("none").uses_teacher
    assert request.config("irg").losses.weights()["edges"] == 2 and request.config("irg").losses.weights()["kd"] == 0
    assert request.config("irg+kd", 7).losses.weights()["kd"] == 0.5 and request.config("irg+kd", 7).seed == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "none,irgkd"), "unknown method 'irgkd'; did you mean irg+kd"),
        (("--methods", ","), "--methods names no method"),
        (("--methods", "none", "--finished"), "has no finished run of these methods and seeds"),
        (("--seeds", 0), "--seeds 0 --jobs 1: both must be at least 1"),
        (("--jobs", 0), "--seeds 3 --jobs 0: both must be at least 1"),
        (("--method", "kd"), "compare does not take --method"),
        (("--overwrite",), "compare does not take --overwrite"),
        (("--epoch", 3), "no option --epoch; did you mean --epochs"),
        (("--methods", "none,kd"), "method 'kd' needs a teacher"),
        (("--methods", "none", "--lr", -1), "--lr -1.0: expected a value greater than 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_run(
    run: Run, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = run("compare", *RECIPE, "--output", tmp_path / "out", *options)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_several_runs_at_once(
    run: Run, teacher: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Stopped by Ctrl-C and given again: the students are those that one run after the other gives.

    Bit for bit under one number of threads only: two sum in another order than one.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    together = tmp_path / "together"
    methods = ("compare", "--methods", "none,fitnet", "--seeds", 1)
    options = (*RECIPE, *teacher, "--epochs", 3, "--batch-size", 32, "--set", "data.train_images=512")
    words = (*methods, *options, "--jobs", 2, "--output", together)
    process = Command(tmp_path, *words)
    states = [together / method / "0" / "state" / "state.safetensors" for method in ("none", "fitnet")]
    while not all(state.exists() for state in states):
        assert process.poll() is None, process.end()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    code, _, error = process.end()
    assert code == 130 and "repeat the command to continue" in error
    for method in ("none", "fitnet"):
        log = (together / method / "0" / "log.txt").read_text()
        assert "all saved" in log or "stopped by SIGTERM" in log
    code, _, error = Command(tmp_path, *words).end()
    assert code == 0, error
    assert run(*methods, *options, "--output", tmp_path / "alone").code == 0
    for method in ("none", "fitnet"):
        a, b = (load_file(folder / method / "0" / "last.safetensors") for folder in (together, tmp_path / "alone"))
        assert all(torch.equal(a[key], b[key]) for key in a), method


@pytest.mark.slow
def test_a_run_that_fails_is_named(run: Run, teacher: tuple[object, ...], tmp_path: Path) -> None:
    options = (*RECIPE, *teacher, "--methods", "logits", "--seeds", 1, "--lr", 1e18, "--epochs", 3)
    for jobs in (1, 2):
        result = run("compare", *options, "--jobs", jobs, "--output", tmp_path / str(jobs))
        assert result.code == 2 and "logits, seed 0" in result.err and "the loss is not finite" in result.err


def test_encoders_are_compared_by_their_neighbours(run: Run, teacher: tuple[object, ...], tmp_path: Path) -> None:
    """Without labels to train on: k-NN accuracy where the validation images have some, and no student alone."""
    output = tmp_path / "out"
    options = (*RECIPE, *teacher, "--no-labels", "--output", output)
    result = run("compare", "--methods", "rkd,embedding", "--seeds", 2, *options)
    assert result.code == 0, result.err
    content = json.loads((output / "compare.json").read_text())
    assert content["metric"] == "knn_top1" and "k-NN top-1 %" in (output / "compare.md").read_text()
    for row in content["rows"]:
        summaries = [json.loads((output / row["method"] / str(s) / "summary.json").read_text()) for s in row["seeds"]]
        assert row["knn_top1"] == [summary["last_knn_top1"] for summary in summaries]
        assert row["best_mean"] == pytest.approx(statistics.fmean(summary["knn_top1"] for summary in summaries))
        assert "difference" not in row and [len(curve) for curve in row["curves"]] == [1, 1]
    mixed = run("compare", "--methods", "kd,rkd", *options[:-1], tmp_path / "mixed")
    assert mixed.code == 2 and "kd trains a classifier" in mixed.err and not (tmp_path / "mixed").exists()
    alone = run("compare", "--methods", "none,rkd", *options[:-1], tmp_path / "mixed")
    assert alone.code == 2 and "none" in alone.err and not (tmp_path / "mixed").exists()


def test_intervals() -> None:
    values = [1.0, 2.0, 4.0, 3.5]
    assert mean_and_deviation(values) == (pytest.approx(2.625), pytest.approx(statistics.stdev(values)))
    assert mean_and_deviation([5.0]) == (5.0, None)
    stats = pytest.importorskip("scipy.stats")
    low, high = stats.t.interval(0.95, 3, loc=2.625, scale=stats.sem(values))
    mean, half = paired_interval(values)
    assert (mean - half, mean + half) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3))
    for freedom in (*range(1, 40), 100, 10_000):
        assert t_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=5.1e-4)


def test_another_teacher_is_refused(run: Run, teacher: tuple[object, ...], tmp_path: Path) -> None:
    """Its students would stand in one table with those of the first; a summary that cannot be read is named."""
    output = tmp_path / "out"
    options = ("--seeds", 1, *RECIPE, "--output", output)
    assert run("compare", "--methods", "none,kd", *options, *teacher).code == 0
    own = Path(str(teacher[1]))
    metadata = read_metadata(own)
    assert metadata is not None
    weights = {name: value * 2 if value.is_floating_point() else value for name, value in load_file(own).items()}
    save_tensors(tmp_path / "other.safetensors", weights, metadata)
    other = (teacher[0], tmp_path / "other.safetensors", *teacher[2:])
    refused = run("compare", "--methods", "none,kd,irg", *options, *other)
    assert refused.code == 2 and f"{output / 'kd' / '0'} learnt from a teacher with other weights" in refused.err
    assert not (output / "irg").exists()
    (output / "kd" / "0" / "summary.json").write_text("{")
    broken = run("compare", "--methods", "none,kd", *options, *teacher)
    assert broken.code == 2 and f"{output / 'kd' / '0' / 'summary.json'} is damaged" in broken.err


def test_curves_of_runs_with_gaps_and_different_lengths() -> None:
    """By hand: the mean over the seeds that have a value."""
    axes = curves_figure("runs", {"kd": [[10.0, None, 30.0], [20.0, 40.0]], "none": [[], []]}).axes[0]
    kd, none = axes.get_lines()
    assert kd.get_xdata().tolist() == [1, 2, 3] and kd.get_ydata().tolist() == [15, 40, 30]
    assert len(none.get_xdata()) == 0
