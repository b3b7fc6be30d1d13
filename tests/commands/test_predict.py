"""`irgdistill predict`: rows for images by their exact names, and what is left out."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from support import Run
from timm.data import create_transform

from irgdistill.io import save_tensors
from irgdistill.models import build_network, class_names, describe

NASTY = os.fsdecode(b'a,"b\n\xfe\x1b[31m.png')


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def expected(teacher: Path, image: Path) -> dict[str, float]:
    """Class -> probability, by timm alone."""
    model = timm.create_model("cifar_resnet14_x0_5", num_classes=3)
    model.load_state_dict(load_file(teacher / "best.safetensors"))
    cfg = json.loads((teacher / "config.json").read_text())
    values = cfg["pretrained_cfg"]
    chosen = {key: values[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    with torch.no_grad():
        logits = model.eval()(create_transform(**chosen)(Image.open(image).convert("RGB"))[None])
    return dict(zip(cfg["label_names"], logits.softmax(1)[0].tolist(), strict=True))


def test_class_and_probability_of_each_file(run: Run, teacher: Path, folder: Path) -> None:
    red, blue = folder / "val/red", folder / "val/blue/000.png"
    result = run("predict", teacher, red, blue, "--workers", 0)
    assert result.code == 0 and "9 of 9 images predicted, 0 unreadable" in result.err
    found = rows(result.out)
    assert [row["file"] for row in found] == [*(str(path) for path in sorted(red.iterdir())), str(blue)]
    assert [row["class"] for row in found] == ["red"] * 8 + ["blue"]
    for row in found:
        wanted = expected(teacher, Path(row["file"]))
        assert row["class"] == max(wanted, key=lambda name: wanted[name])
        assert float(row["probability"]) == pytest.approx(max(wanted.values()), abs=2e-6)


def test_top_classes_as_columns_and_as_json(run: Run, teacher: Path, folder: Path) -> None:
    blue = folder / "val/blue/000.png"
    row = rows(run("predict", teacher, blue, "--workers", 0, "--top", 2).out)[0]
    assert list(row) == ["file", "class", "probability", "class_2", "probability_2"]
    found = json.loads(run("predict", teacher, blue, "--workers", 0, "--top", 99, "--json").out)
    wanted = sorted(expected(teacher, blue).items(), key=lambda item: -item[1])
    assert found["file"] == str(blue) and [each["class"] for each in found["classes"]] == [name for name, _ in wanted]
    assert [each["probability"] for each in found["classes"]] == pytest.approx([p for _, p in wanted], abs=2e-6)
    assert row["class_2"] == wanted[1][0]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_counted_and_left_out(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, workers: int
) -> None:
    """At the start, in the middle, in a whole batch and at the end."""
    red, output = folder / "val/red", tmp_path / "out.csv"
    for name in ("000.png", "003.png", "004.png", "007.png"):
        (red / name).write_bytes(b"broken")
    words = ("predict", teacher, red, "--batch-size", 2, "--workers", workers, "--output", output)
    result = run(*words)
    assert result.code == 0 and "4 of 8 images predicted, 4 unreadable" in result.err
    assert [Path(row["file"]).name for row in rows(output.read_text())] == ["001.png", "002.png", "005.png", "006.png"]
    assert all(f"unreadable image left out: {red / name}" in result.err for name in ("000.png", "007.png"))
    refused = run(*words, "--overwrite", "--max-bad-images", 2)
    assert refused.code == 2 and "3 unreadable images, 2 allowed (--max-bad-images)" in refused.err
    assert len(rows(output.read_text())) == 4, "a failed command leaves the file as it was"


def test_names_are_exact_in_files_and_safe_on_a_terminal(
    run: Run, teacher: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = folder / "odd"
    odd.mkdir()
    shutil.copy(folder / "val/red/000.png", odd / NASTY)
    output = tmp_path / "out.csv"
    assert run("predict", teacher, odd, "--workers", 0, "--output", output).code == 0
    found = rows(output.read_bytes().decode("utf-8", "surrogateescape"))
    assert [row["file"] for row in found] == [str(odd / NASTY)]
    line = run("predict", teacher, odd, "--workers", 0, "--json").out
    assert json.loads(line)["file"] == str(odd / NASTY)
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda self: True, raising=False)
    shown = run("predict", teacher, odd, "--workers", 0).out
    assert shown.count("\n") == 2 and "\x1b" not in shown and r"\xfe\x1b[31m.png" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.png",), "no file or folder nowhere.png"),
        (("val", "--top", 0), "--top 0: expected at least 1"),
        (("train/red", "--output", "val"), "--output val is a folder"),
        (("train/red", "--output", "x/y.csv"), "--output x/y.csv cannot be written: there is no folder x"),
        (("train/red", "--output", "val/red/000.png"), "is there already; give another --output, or --overwrite"),
        (("empty",), "no images in empty"),
        (("empty.png",), "none of 1 images can be read"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, teacher: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "empty.png").touch()
    result = run("predict", teacher, *words, "--workers", 0)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err


def test_a_network_without_a_classifier_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    network = build_network("cifar_resnet20", num_classes=0)
    save_tensors(tmp_path / "encoder.safetensors", network.model.state_dict(), describe(network, []))
    result = run("predict", tmp_path / "encoder.safetensors", folder)
    assert result.code == 2 and "cifar_resnet20 has no classifier, so it predicts no classes" in result.err


def test_names_of_classes() -> None:
    network = build_network("resnet18", meta=True)
    assert class_names(network)[:2] == ["0", "1"]
    assert class_names(network, pretrained=True)[0] == "tench, Tinca tinca"
    network.classes = [f"c{i}" for i in range(1000)]
    assert class_names(network, pretrained=True)[999] == "c999"
    few = build_network("resnet18", num_classes=3, meta=True)
    few.model.pretrained_cfg["label_names"] = ["a", "b", "c"]  # type: ignore[index,operator]
    assert class_names(few) == ["a", "b", "c"]
