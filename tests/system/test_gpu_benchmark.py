"""The benchmark that waits for a GPU runs at tiny sizes on the CPU, part by part, and its pack is read as data."""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support import command, write_images

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import gpu_pack


@pytest.fixture
def tiny(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", tiny=True, rounds=0, limit=60, one_json=None, pack=tmp_path / "pack")


def test_steps_and_edges(tiny: argparse.Namespace) -> None:
    assert {row["method"] for row in gpu.step(tiny)} == {"student", "floor", "plain-floor", "irg+kd"}
    assert [row["images"] for row in gpu.edges(tiny)] == [256, 1024]


@pytest.mark.parametrize("packed", [False, True], ids=["digits", "pack"])
def test_real_training(tiny: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packed: bool) -> None:
    short = ("--set", "data.train_images=64", "--set", "data.val_fraction=0.05", "--batch-size", 32, "--input-size", 16)
    ran: list[object] = []
    monkeypatch.setattr(gpu, "irgdistill", lambda *words, **_: (ran.extend(words), (command(*words, *short), ""))[1])
    if packed:
        for part, count in (("train", 40), ("val", 4)):
            write_images(tmp_path / "data" / part, {"red": count, "green": count})
        tiny.pack.mkdir()
        gpu_pack.pack(tmp_path / "data", tiny.pack / "data.tar", 2**20)
        assert gpu.packed(tiny) == (str(tiny.pack / "data.tar"), 2, 80)
    (row,) = gpu.train(tiny)
    assert row["code"] == 0 and row["epochs"] == 1 and row["images_per_second"] > 0
    assert ("cifar100-standard" in ran) == (str(tiny.pack / "data.tar") in ran) == packed


@pytest.mark.slow
def test_a_killed_run_is_resumed_bit_for_bit(tiny: argparse.Namespace) -> None:
    assert gpu.resume(tiny) == [{"codes": [0, -9, 0], "differences": []}]


def test_a_part_that_takes_too_long_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gpu.py", "--tiny", "--device", "cpu", "--parts", "edges,train,step", "--limit", "0.01"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(tmp_path / "gpu.json")])
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)  # a file that a process can write to
    with pytest.raises(SystemExit):
        gpu.main()
    record: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["error"] for name, part in record["parts"].items()} == dict.fromkeys(
        ("edges", "train", "step"), "took more than 0.01 s"
    )
    assert record["versions"]["torch"] and "instructions" in record["machine"]
    assert capsys.readouterr().out.count("| CPU |") == 3


def test_a_pack_holds_as_many_of_each_class_as_fit_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, count in (("train", 20), ("val", 4)):
        write_images(tmp_path / "data" / part, {"red": count, "green": count})
    (tmp_path / "weights").write_bytes(bytes(10 * 1024))
    words = ["--data", tmp_path / "data", "--teacher", f"net={tmp_path / 'weights'}", "--mib", 60 / 1024]
    monkeypatch.setattr(sys, "argv", [*map(str, ["gpu_pack.py", *words, "--output", tmp_path / "pack"])])
    gpu_pack.main()
    files = {path.name: path.stat().st_size for path in (tmp_path / "pack").iterdir()}
    assert set(files) == {"data.tar", "net.safetensors"} and 40 * 1024 < sum(files.values()) <= 60 * 1024
    with tarfile.open(tmp_path / "pack" / "data.tar") as tar:
        names = tar.getnames()
    train = [name for name in names if name.startswith("train/")]
    assert len(names) - len(train) == 8 and 0 < len(train) < 40
    assert abs(sum("red" in name for name in train) - sum("green" in name for name in train)) <= 1
