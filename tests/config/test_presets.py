"""`irgdistill presets`, and the preset for small data from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support import Run

from irgdistill.config.loading import load_config, presets


def test_the_list_names_every_preset_and_what_it_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = run("presets")
    assert shown.code == 0 and not shown.err
    words = [line.strip() for line in shown.out.splitlines()]
    lines = dict(zip(words[::2], words[1::2], strict=True))
    assert set(lines) == set(presets())
    assert lines["quickstart"].strip() == "Handwritten digits in seconds on a CPU: what `make demo` runs."
    assert all(text[:1].isupper() and text.strip().endswith(".") for text in lines.values()), "a sentence each"


def test_a_printed_preset_can_be_copied_and_used(run: Run, tmp_path: Path) -> None:
    shown = run("presets", "cifar10-paper")
    assert shown.code == 0 and shown.err.strip() == f"from {presets()['cifar10-paper']}"
    (tmp_path / "mine.yaml").write_text(shown.out)
    assert load_config(str(tmp_path / "mine.yaml")) == load_config("cifar10-paper")


def test_presets_as_json(run: Run) -> None:
    every = [json.loads(line) for line in run("presets", "--json").out.splitlines()]
    assert [entry["name"] for entry in every] == list(presets())
    one = json.loads(run("presets", "quickstart", "--json").out)
    assert one in every and set(one) == {"name", "summary", "path", "text"}
    assert yaml.safe_load(one["text"])["data"]["source"] == "digits" and Path(one["path"]).is_file()


def test_an_unknown_preset_is_told_the_nearest(run: Run) -> None:
    result = run("presets", "quikstart")
    assert result.code == 2 and result.err.startswith("irgdistill: no preset 'quikstart'; did you mean quickstart?")


def test_small_data_from_a_checkpoint_under_a_teacher_of_other_classes(run: Run, folder: Path, tmp_path: Path) -> None:
    """As a user would: a student that knows digits learns colours, under a teacher that knows digits."""
    first = ("--preset", "quickstart", "--method", "none", "--student", "cifar_resnet14_x0_5", "--epochs", 1)
    assert run("distill", *first, "--output", tmp_path / "first", "--workers", 0).code == 0
    options = ("--preset", "finetune-small-data", "--data", folder, "--batch-size", 24, "--workers", 0, "--epochs", 20)
    options += ("--teacher-checkpoint", tmp_path / "first", "--student-checkpoint", tmp_path / "first")
    result = run("distill", *options, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert "its classifier is new, for 3 classes instead of 10" in result.err
    summary = json.loads(result.out)
    assert summary["method"] == "mtk" and summary["last_top1"] > 60, "chance is 33.3"
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert set(records[-2]["terms"]) == {"ce", "edges", "transform"}
