"""A local file never makes a command reach for the network: what it names is refused in one line, or not used."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import OLD, Result, Run, write_images

from irgdistill.errors import TrainingError
from irgdistill.io.tensors import read_tensors, save_tensors
from irgdistill.training.trainer import Trainer

pytest.importorskip("datasets")
DATA = ("--input-size", 16, "--batch-size", 8, "--workers", 0, "--device", "cpu")
STUDENT = ("--student", "cifar_resnet14_x0_5", "--epochs", 1)
REMOTE = "hfds/owner/images"


@pytest.fixture(autouse=True)
def lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What was looked up or connected to, which must be nothing."""
    asked: list[object] = []

    def refuse(*words: object, **_: object) -> None:
        asked.append(words)
        raise AssertionError(f"a file made the tool reach for the network: {words}")

    def fit(self: Trainer) -> None:
        raise TrainingError("all is ready")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(Trainer, "fit", fit)
    yield asked


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    classes = {str(number): 2 for number in range(10)}
    write_images(tmp_path / "photos" / "val", classes)
    return write_images(tmp_path / "photos" / "train", classes).parent


def lines(result: Result) -> list[str]:
    """Without the warnings that keys of version 0.1 have another name."""
    return [line for line in result.err.splitlines() if " is now called " not in line]


def naming(old: Path, data: Any) -> Path:
    """A checkpoint whose metadata name this data set."""
    tensors, metadata = read_tensors(old / "finished/best.safetensors")
    assert metadata is not None
    file = old / "elsewhere.safetensors"
    save_tensors(file, tensors, {**metadata, "data": {**metadata["data"], "train_images": None, **data}})
    return file


def test_data_that_a_checkpoint_names_is_refused_unless_typed(
    run: Run, old: Path, tmp_path: Path, lookups: list[object]
) -> None:
    for source in (REMOTE, "hfids/owner/images", "tfds/mnist"):
        file = naming(old, {"source": source, "download": True})
        for words in (("eval", file), ("eval", file, "--probe", "knn"), ("inspect-graph", file)):
            result = run(*words, "--workers", 0)
            assert result.code == 2 and len(lines(result)) == 1, result.err
            assert f"{file} records the data set {source}, which is looked up on the network" in result.err
            assert f"--data {source}" in result.err
    exported = run("export", file, "--format", "timm", "--check-images", 2, "--output", tmp_path / "out")
    assert exported.code == 0 and "random images" in exported.out + exported.err
    assert not lookups
    allowed = run("eval", naming(old, {"source": REMOTE}), "--data", REMOTE, "--workers", 0)
    assert allowed.code == 2 and "Traceback" not in allowed.err and lookups


def test_a_checkpoint_downloads_nothing(run: Run, old: Path, tmp_path: Path, lookups: list[object]) -> None:
    for source in ("torch/cifar10", "wds/https://example.com/x", "https://example.com/x.tar", "wds/pipe:touch x"):
        file = naming(old, {"source": source, "download": True, "root": str(tmp_path / "none")})
        for words in (("eval", file), ("inspect-graph", file)):
            result = run(*words, "--workers", 0)
            assert result.code == 2 and len(lines(result)) == 1, result.err
    assert not lookups


@pytest.mark.usefixtures("no_figures")
def test_commands_on_local_images_use_no_recorded_data(
    run: Run, old: Path, photos: Path, tmp_path: Path, lookups: list[object]
) -> None:
    file, out = naming(old, {"source": REMOTE, "download": True}), tmp_path / "out"
    data = ("--data", photos, *DATA)
    for words, code in (
        (("predict", file, photos, "--workers", 0), 0),
        (("embed", file, "--data", photos, "--output", tmp_path / "e.safetensors", "--workers", 0), 0),
        (("eval", file, "--probe", "knn", "--data", photos, "--workers", 0), 0),
        (("cache-teacher", "--teacher-checkpoint", file, *data, "--output", tmp_path / "cache"), 0),
        (("distill", "--teacher-checkpoint", file, *STUDENT, *data, "--output", out, "--skip-teacher-check"), 2),
        (("train", "--checkpoint", file, "--epochs", 1, *data, "--output", out, "--overwrite"), 2),
    ):
        result = run(*words)
        assert result.code == code and (code == 0 or "all is ready" in result.err), (words, result.err)
    assert not lookups


def test_a_cache_names_no_network_to_look_up(run: Run, old: Path, photos: Path, lookups: list[object]) -> None:
    manifest = old / "cache/cache.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values).replace("cifar_resnet14_x0_5", "hf-hub:owner/network"))
    words = ("distill", "--teacher-cache", old / "cache", *STUDENT, "--data", photos, *DATA, "--output", old / "run")
    result = run(*words)
    assert result.code == 2 and len(lines(result)) == 1 and "hf-hub:owner/network" in result.err
    assert not lookups


def test_a_comparison_looks_nothing_up(
    run: Run, old: Path, photos: Path, tmp_path: Path, lookups: list[object]
) -> None:
    folder = tmp_path / "all" / "none" / "0"
    shutil.copytree(OLD / "finished", folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["source"], config["teacher"]["name"] = REMOTE, "hf-hub:owner/network"
    config["method"] = "none"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = ("compare", "--finished", "--methods", "none", "--seeds", 1, *STUDENT, "--data", photos, *DATA)
    result = run(*words, "--output", tmp_path / "all")
    assert result.code == 2 and len(lines(result)) == 1, result.err
    assert "holds a comparison with other settings" in result.err
    assert not lookups


def test_a_run_is_resumed_on_the_data_that_it_names(run: Run, old: Path, lookups: list[object]) -> None:
    """Whoever resumes a run has typed its data once: a line says that they are looked up. `--data` replaces them."""
    file = old / "unfinished" / "config.yaml"
    recorded = file.read_text().replace("source: digits", f"source: {REMOTE}")
    words = ("distill", "--resume", old / "unfinished", "--teacher-checkpoint", old / "teacher/last.safetensors")
    file.write_text(recorded)
    typed = run(*words, "--data", "digits")
    assert "all is ready" in typed.err and "from the network" not in typed.err and not lookups
    file.write_text(recorded)
    result = run(*words)
    first, *others = lines(result)
    assert first == f"{old / 'unfinished'} reads {REMOTE} from the network"
    assert result.code == 2 and len(others) == 1 and others[0].startswith("irgdistill: "), result.err
