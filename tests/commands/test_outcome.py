"""The end of a run: teacher and student side by side, with the numbers that other commands give."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import SMALL, Run, records

from irgdistill.commands.outcome import _difference

TITLES = ("top-1 %", "k-NN top-1 %", "parameters", "size in MB", "ms per image (batch 1)")
STUDENT = ("--student", "cifar_resnet20", "--epochs", 1, *SMALL)


def cells(shown: str) -> dict[str, list[str]]:
    """Title -> the cells of its row."""
    return {
        title: line[len(title) :].split() for line in shown.splitlines() for title in TITLES if line.startswith(title)
    }


def megabytes(run_folder: Path) -> float:
    tensors = load_file(run_folder / "best.safetensors").values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def test_teacher_and_student_side_by_side(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    output = Path("a run")
    ended = run("distill", "--teacher-checkpoint", teacher, "--data", folder, *STUDENT, "--output", output, "--json")
    assert ended.code == 0 and json.loads(ended.out), "the table is not part of the JSON"
    shown = ended.err[ended.err.index("best top-1") :].partition("\n")[2]
    assert shown.startswith("cifar_resnet14_x0_5 → cifar_resnet20") and max(map(len, shown.splitlines())) <= 80
    found = cells(shown)

    own, taught = json.loads((output / "summary.json").read_text())["top1"], records(output, "teacher")[0]["top1"]
    assert found["top-1 %"] == [f"{taught:.2f}", f"{own:.2f}", f"{round(own, 2) - round(taught, 2):+.2f}"]
    counts = [json.loads(run("eval", each, "--json", "--workers", 0).out)["params"] for each in (teacher, output)]
    assert found["parameters"] == [*(f"{count:,}" for count in counts), f"{counts[1] / counts[0]:.1f}×", "more"], (
        "the batch norms of the teacher are folded while the run goes on"
    )
    assert found["size in MB"][:2] == [f"{megabytes(each):.2f}" for each in (teacher, output)]
    assert all(0 < float(value) < 1000 for value in found["ms per image (batch 1)"][:2])

    commands = [line.replace("next:", "     ").strip() for line in shown.splitlines()[-2:]]
    for line, name in zip(commands, ("eval", "export"), strict=True):
        assert shlex.split(line) == ["irgdistill", name, str(output)]


def test_one_network_has_no_column_for_a_teacher(run: Run, folder: Path, tmp_path: Path) -> None:
    ended = run("train", "--model", "cifar_resnet14_x0_5", *STUDENT[2:], "--data", folder, "--output", tmp_path / "run")
    found = cells(ended.err)
    assert ended.code == 0 and "difference" not in ended.err and "teacher" not in ended.err
    assert found["size in MB"] == [f"{megabytes(tmp_path / 'run'):.2f}"] and len(found["ms per image (batch 1)"]) == 1


def test_an_encoder_has_its_own_metric_and_a_cache_no_speed(
    run: Run, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    words = ("--teacher-checkpoint", teacher, "--data", folder, "--method", "encoder", *SMALL)
    ended = run("distill", *words, *STUDENT[:4], "--no-labels", "--output", tmp_path / "encoder")
    last = records(tmp_path / "encoder", "eval")[-1]
    assert ended.code == 0, ended.err
    assert cells(ended.err)["k-NN top-1 %"][:2] == [f"{last[key]:.2f}" for key in ("teacher_knn_top1", "knn_top1")]
    assert f"next: irgdistill eval {tmp_path / 'encoder'} --probe knn\n" in ended.err

    cached = run("cache-teacher", *words, "--views", 1, "--output", tmp_path / "cache")
    assert cached.code == 0, cached.err
    ended = run("distill", "--teacher-cache", tmp_path / "cache", *words, *STUDENT[:4], "--output", tmp_path / "run")
    found = cells(ended.err)
    assert ended.code == 0 and found["ms per image (batch 1)"][0] == found["ms per image (batch 1)"][2] == "–"
    assert found["top-1 %"][0] == "–" and found["parameters"][0] != "–"


def test_the_difference_in_words() -> None:
    assert _difference("top-1 %", 91.204, 89.405) == "-1.79", "as the two numbers are shown"
    assert _difference("parameters", 300, 100) == "3.0× less"
    assert _difference("ms per image (batch 1)", 10.0, 25.0) == "2.5× more"
    assert _difference("top-1 %", None, 1.0) == "–"
