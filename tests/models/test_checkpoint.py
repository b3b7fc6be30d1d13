"""What lies on disk: exact keys, metadata, atomic files, states."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from irgdistill.errors import UserError
from irgdistill.io.atomic import write_atomically, write_text
from irgdistill.io.run_folder import RunFolder
from irgdistill.io.tensors import read_metadata, read_tensors, save_tensors
from irgdistill.models import checkpoint
from irgdistill.models.build import build_network, rebuild_network
from irgdistill.models.checkpoint import CheckpointMetadata, TeacherRecord, restore
from irgdistill.training import checkpointing, state
from irgdistill.training.state import load_state, save_state

CLASSES = ["a", "b", "c"]
CPU = torch.device("cpu")


def save(path: Path, name: str = "cifar_resnet14_x0_5", **options: object) -> nn.Module:
    network = build_network(name, num_classes=3, **options)  # type: ignore[arg-type]
    save_tensors(path, network.model.state_dict(), checkpoint.describe(network, CLASSES))
    return network.model


def test_a_checkpoint_describes_itself(tmp_path: Path) -> None:
    model = save(tmp_path / "c.safetensors", input_size=(24, 24))
    assert set(load_file(tmp_path / "c.safetensors")) == set(model.state_dict())
    network, metadata = restore(tmp_path / "c.safetensors")
    assert network.architecture == "cifar_resnet14_x0_5" and network.classes == CLASSES
    assert network.input.size == (24, 24) and network.num_classes == 3
    assert metadata is not None and metadata.mean == pytest.approx((0.485, 0.456, 0.406))
    for key, value in network.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    with pytest.raises(UserError, match="holds a cifar_resnet14_x0_5, not a resnet18"):
        restore(tmp_path / "c.safetensors", "resnet18")


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    save(tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").stat().st_mode & 0o444 == 0o444


BARE = """
import json, sys, timm, torch
for name, path, folder, size, args in json.loads(sys.argv[1]):
    images = torch.ones(1, 3, size, size)
    model = timm.create_model(name, num_classes=3, checkpoint_path=path, **args)
    local = timm.create_model('local-dir:' + folder, pretrained=True)
    print(float(model.eval()(images).sum()), float(local.eval()(images).sum()))
assert 'irgdistill' not in sys.modules
"""


@pytest.mark.slow
def test_the_student_is_a_plain_timm_model_in_a_bare_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    students, expected = [], []
    for name, size in (("mobilenetv3_small_050", 64), ("vit_tiny_patch16_224", 64)):
        network = build_network(name, num_classes=3, input_size=(size, size))
        folder = RunFolder(tmp_path / name)
        folder.create(overwrite=False)
        for path in (folder.best, folder.last):
            save_tensors(path, network.model.state_dict(), checkpoint.describe(network, CLASSES))
        folder.timm_config.write_text(json.dumps(checkpoint.timm_config(network, CLASSES)))
        expected += 2 * [network.model.eval()(torch.ones(1, 3, size, size)).sum().item()]
        students.append((name, str(folder.best), str(folder.path), size, network.args))
    command = [sys.executable, "-c", BARE, json.dumps(students)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [float(number) for number in output.split()] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
def test_truncated_files_are_one_line(tmp_path: Path, size: int) -> None:
    save(tmp_path / "c.safetensors")
    path = tmp_path / "cut.safetensors"
    path.write_bytes((tmp_path / "c.safetensors").read_bytes()[:size])
    with pytest.raises(UserError, match="truncated or not a safetensors file") as error:
        restore(path)
    assert "\n" not in str(error.value)


def test_newer_formats_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "c.safetensors", {"x": torch.ones(1)}, {"format": 99})
    with pytest.raises(UserError, match="newer irgdistill"):
        read_metadata(tmp_path / "c.safetensors")


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """Every bit of a file: refused in one line or, in the ten letters that mark our files, taken for a foreign one."""
    path = tmp_path / "c.safetensors"
    tensors = {
        "a": torch.arange(3.0),
        "b": torch.tensor(2, dtype=torch.int64),
        "c": torch.ones(2, dtype=torch.bfloat16),
    }
    save_tensors(path, {**tensors, "none": torch.empty(0)}, {"format": 2, "text": "ü"})
    assert read_tensors(path)[1] == {"format": 2, "text": "ü"}
    whole, refused = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            values, metadata = read_tensors(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            at = whole.index(b'"irgdistill"')
            assert (
                at < bit // 8 < at + 11 and metadata is None and all(torch.equal(values[k], tensors[k]) for k in "abc")
            )
    assert refused >= 8 * (len(whole) - 10)


def test_a_file_of_ours_has_a_checksum(tmp_path: Path) -> None:
    header = {"irgdistill": json.dumps({"format": 2})}
    save_file({"x": torch.ones(1)}, tmp_path / "new.safetensors", metadata=header)
    with pytest.raises(UserError, match="is damaged: its content does not match its checksum"):
        read_tensors(tmp_path / "new.safetensors")


def test_foreign_safetensors_have_no_metadata(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "f.safetensors")
    assert read_metadata(tmp_path / "f.safetensors") is None
    with pytest.raises(UserError, match="no file"):
        read_metadata(tmp_path / "missing.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_the_previous_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    for number in range(3):
        write_atomically(tmp_path / "f", lambda p, n=number: p.write_text(str(n)), tmp_path / "g")  # type: ignore[misc]
    assert (tmp_path / "f").read_text() == "2" and (tmp_path / "g").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"f", "g"}


def test_what_counts_as_best_is_what_is_on_disk(tmp_path: Path) -> None:
    """Newer than the state: counts. Older, missing or damaged: told, and the best is sought anew."""
    path, told = tmp_path / "best.safetensors", []
    assert checkpointing.best_on_disk(path, {}, told.append) == {} and not told
    save_tensors(path, {"x": torch.ones(1)}, {"format": 2, "metrics": {"top1": 50.0, "epoch": 5}})
    for remembered in ({}, {"top1": 50.0, "epoch": 5}, {"top1": 40.0, "epoch": 3}):
        assert checkpointing.best_on_disk(path, remembered, told.append) == {"top1": 50.0, "epoch": 5} and not told
    assert checkpointing.best_on_disk(path, {"top1": 60.0, "epoch": 6}, told.append)["epoch"] == 5
    path.unlink()
    assert checkpointing.best_on_disk(path, {"top1": 60.0, "epoch": 6}, told.append) == {}
    assert "is not the best of the run, top-1 60.00 of epoch 6" in told[0] and "no file" in told[1]


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "none": None, "best": {}, "list": [1, 2.5, "x"], "t": torch.arange(3)}
    save_state(tmp_path / "s.safetensors", state)
    loaded = load_state(tmp_path / "s.safetensors")
    assert loaded["list"] == [1, 2.5, "x"] and loaded["none"] is None and loaded["best"] == {}
    other = torch.optim.AdamW(nn.Linear(3, 2).parameters(), lr=9.0)
    other.load_state_dict(loaded["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1
    for key, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(other.state_dict()["state"][0][key], value)


def test_random_states_come_back(tmp_path: Path) -> None:
    import random

    import numpy as np

    save_state(tmp_path / "s.safetensors", {"random": state.random_states(CPU)})
    expected = random.random(), np.random.rand(), torch.rand(1)
    saved = load_state(tmp_path / "s.safetensors")["random"]
    state.restore_random_states(state.RandomStates.parse(saved, tmp_path), CPU)
    assert (random.random(), np.random.rand()) == expected[:2] and torch.equal(torch.rand(1), expected[2])


def test_another_run_is_never_overwritten_unasked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    folder.create(overwrite=False)
    folder.config.write_text("seed: 0")
    with pytest.raises(UserError, match="files of a run that cannot be resumed; give another --output or --overwrite"):
        folder.create(overwrite=False)
    folder.state.write_text("")
    with pytest.raises(UserError, match=r"unfinished run; .*--resume"):
        folder.create(overwrite=False)
    folder.summary.write_text("{}")
    with pytest.raises(UserError, match="finished run; give another --output or --overwrite"):
        folder.create(overwrite=False)
    folder.create(overwrite=True)
    assert not folder.config.exists() and (tmp_path / "notes.txt").read_text() == "mine"


def test_metadata_are_read_into_one_object(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    network = build_network("vit_tiny_patch16_224", num_classes=3, input_size=(64, 64), meta=True)
    values = json.loads(json.dumps(checkpoint.describe(network, CLASSES)))
    teacher = {"architecture": "resnet18", "name": "resnet18.a1_in1k", "weights": "0123abcd", "input_size": [64, 32]}
    save_tensors(path, {"x": torch.ones(1)}, {**values, "method": "kd", "seed": 3, "teacher": teacher, "later": 1})
    metadata = CheckpointMetadata.read(path)
    assert metadata is not None and metadata.classes == CLASSES and (metadata.method, metadata.seed) == ("kd", 3)
    assert metadata.teacher == TeacherRecord(**teacher) and metadata.teacher.checkpoint is None
    assert metadata.args == {"img_size": [64, 64]} and metadata.args_without_size == {}
    again = rebuild_network(metadata, meta=True)
    assert json.loads(json.dumps(again.describe())) == {k: values[k] for k in again.describe()}


def test_a_checkpoint_may_describe_a_network_alone(tmp_path: Path) -> None:
    save(tmp_path / "c.safetensors")
    metadata = CheckpointMetadata.read(tmp_path / "c.safetensors")
    assert metadata is not None and metadata.teacher is None and metadata.data is None and metadata.metrics == {}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_classes": "many"}, "num_classes"),
        ({"mean": None}, "mean"),
        ({"input_size": [32]}, "input_size"),
        ({"teacher": {"name": "resnet18"}}, "teacher.architecture"),
    ],
)
def test_metadata_that_do_not_fit_are_one_line(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    path = tmp_path / "c.safetensors"
    values = checkpoint.describe(build_network("cifar_resnet14_x0_5", num_classes=3, meta=True), CLASSES)
    save_tensors(path, {"x": torch.ones(1)}, {**values, **change})
    with pytest.raises(UserError, match=rf"c\.safetensors has metadata that do not fit: {field}") as error:
        CheckpointMetadata.read(path)
    assert "\n" not in str(error.value)
