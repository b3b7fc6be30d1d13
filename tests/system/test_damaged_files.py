"""Files whose checksum is right and whose content is not: every command ends well or with one line."""

from __future__ import annotations

import copy
import json
import random
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import OLD, Run

from irgdistill.errors import TrainingError
from irgdistill.io.tensors import read_tensors, save_tensors
from irgdistill.training.state import load_state, save_state
from irgdistill.training.trainer import Trainer

JUNK: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        3.5,
        10**6,
        -(10**30),
        10**400,
        float("nan"),
        float("inf"),
        1e308,
        "",
        "x",
        "\x1b[2J[red]x[/]\n",
    ),
    *("hf-hub:a/b", "local-dir:/", "a" * 5000, [], {}, [[[[]]]], {"a": {"b": [1]}}, ["a"] * 3, [None], "0"),
]


INSPECT = ("--images", 6, "--neighbours", 2, "--workers", 0)


DIGITS = ("--data", "digits", "--input-size", 16, "--seed", 1, "--batch-size", 32, "--workers", 0, "--device", "cpu")


STUDENT = ("--student", "cifar_resnet14_x0_5", "--epochs", 1, "--overwrite")


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys that lead to each value of a tree, and to the first ones of each list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*above, key)
        yield from places(item, (*above, key))


def mutations(tree: Any, count: int, seed: int) -> Iterator[tuple[str, Any]]:
    """Copies of a tree in which one value, at any depth, is missing or something else."""
    draw = random.Random(seed)
    found = list(places(tree))
    for _ in range(count):
        depth = draw.choice(sorted({len(place) for place in found}))
        *above, last = draw.choice([place for place in found if len(place) == depth])
        parent = changed = copy.deepcopy(tree)
        for key in above:
            parent = parent[key]
        junk = draw.choice([..., *JUNK])
        if junk is ...:
            del parent[last]
        else:
            parent[last] = junk
        yield f"{'.'.join(map(str, (*above, last)))} = {junk!r:.60}", changed


def ends_well(run: Run, what: str, *words: object) -> None:
    result = run(*words)
    assert result.code in (0, 2), (what, result.err)
    message = result.err[result.err.rfind("irgdistill: ") :]
    assert result.code == 0 or (message.startswith("irgdistill: ") and message.strip().count("\n") == 0), (
        what,
        message,
    )


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the files of version 0.1, which a command may change."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end where training would begin."""

    def fit(self: Trainer) -> None:
        raise TrainingError("all is ready")

    monkeypatch.setattr(Trainer, "fit", fit)


@pytest.fixture
def commands(old: Path, tmp_path: Path) -> Callable[[Path], list[tuple[object, ...]]]:
    """Every command that takes a checkpoint."""

    def on(file: Path) -> list[tuple[object, ...]]:
        teacher, whole = old / "teacher/last.safetensors", old / "finished/best.safetensors"
        graphs, out = (*INSPECT, "--output", tmp_path / "graphs"), ("--output", tmp_path / "out")
        few = ("--set", "data.train_images=64")
        exported = ("--check-images", 2, "--overwrite", *out)
        return [
            ("eval", file, "--workers", 0),
            ("eval", whole, "--against-checkpoint", file, "--workers", 0),
            ("export", file, "--format", "timm", *exported),
            ("export", file, "--format", "hub", *exported),
            ("inspect-graph", file, "--teacher-checkpoint", teacher, *graphs),
            ("inspect-graph", whole, "--teacher-checkpoint", file, *graphs),
            ("inspect-graph", file, *graphs),
            ("inspect-graph", file, "--plan-only"),
            ("inspect-graph", whole, "--teacher-checkpoint", teacher, "--compare", file, *graphs),
            ("distill", *STUDENT, "--teacher-checkpoint", file, *DIGITS, *few, "--output", tmp_path / "run"),
            ("distill", *STUDENT[2:], "--method", "none", "--student-checkpoint", file, *DIGITS, *few, *out),
            ("cache-teacher", "--teacher-checkpoint", file, *DIGITS, *few, "--output", tmp_path / "cache"),
        ]

    return on


@pytest.mark.usefixtures("no_figures", "without_training")
def test_metadata_of_a_checkpoint(run: Run, old: Path, tmp_path: Path, commands: Any) -> None:
    tensors, metadata = read_tensors(old / "finished/best.safetensors")
    file = tmp_path / "changed.safetensors"
    every = commands(file)
    for number, (what, changed) in enumerate(mutations(metadata, 110, seed=0)):
        save_tensors(file, tensors, changed)
        ends_well(run, what, *every[number % len(every)])


@pytest.mark.usefixtures("without_training")
def test_the_state_of_a_run(run: Run, old: Path) -> None:
    file = old / "unfinished/state/state.safetensors"
    whole = load_state(file)
    config = whole.pop("config")
    teacher = ("--teacher-checkpoint", old / "teacher/last.safetensors")
    for what, changed in mutations(whole, 60, seed=0):
        save_state(file, {"config": config, **changed})
        ends_well(run, what, "distill", "--resume", old / "unfinished", *teacher)
    for what, changed in mutations(config, 20, seed=1):
        save_state(file, {"config": changed, **whole})
        ends_well(run, what, "distill", "--resume", old / "unfinished", *teacher)


def test_an_optimizer_that_cannot_use_its_state_is_one_line(run: Run, old: Path) -> None:
    file = old / "unfinished/state/state.safetensors"
    state = load_state(file)
    state["optimizer"]["state"][0]["momentum_buffer"] = "full"
    save_state(file, state)
    result = run("distill", "--resume", old / "unfinished", "--teacher-checkpoint", old / "teacher/last.safetensors")
    assert result.code == 2 and "the optimizer sgd fails at update 4: " in result.err, result.err


@pytest.mark.usefixtures("without_training")
def test_the_manifest_of_a_teacher_cache(run: Run, old: Path, tmp_path: Path) -> None:
    manifest, shard = old / "cache/cache.json", old / "cache/00000.safetensors"
    tensors, metadata = read_tensors(shard)
    options = (*DIGITS, "--set", "data.train_images=320", "--set", "augment.mixup=0")
    student = ("distill", *STUDENT, "--teacher-cache", old / "cache", *options, "--output", tmp_path / "run")
    again = ("cache-teacher", "--teacher-checkpoint", old / "teacher", *options, "--output", old / "cache")
    for number, (what, changed) in enumerate(mutations(json.loads(manifest.read_text()), 80, seed=0)):
        manifest.write_text(json.dumps(changed))
        checksum = f"{zlib.crc32(json.dumps(changed, sort_keys=True).encode()):08x}"
        save_tensors(shard, tensors, {**(metadata or {}), "cache": checksum})
        ends_well(run, what, *(again if number % 4 == 0 else student))


def test_what_a_model_card_reads(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD / "finished", tmp_path / "all" / "irg+kd+at" / "1"))
    rows = [{"method": "irg+kd+at", "seeds": [1]}]
    files = {"summary.json": folder, "compare.json": folder.parents[1]}
    whole = {
        "summary.json": json.loads((folder / "summary.json").read_text()),
        "compare.json": {"rows": rows, "teacher_top1": 50.0, "validation_images": 539},
        "metrics.jsonl": [{"kind": "teacher", "top1": 50.0, "images": 539}],
    }
    (folder.parents[1] / "compare.md").write_text("the table")
    export = ("export", folder, "--format", "hub", "--check-images", 2, "--output", tmp_path / "hub", "--overwrite")
    for what, changed in mutations(whole, 40, seed=0):
        for name, place in files.items():
            (place / name).write_text(json.dumps(changed.get(name)))
        (folder / "metrics.jsonl").write_text(json.dumps(changed.get("metrics.jsonl")).strip("[]"))
        ends_well(run, what, *export)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_figures", "without_training")
@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18", "local-dir:/"])
def test_no_file_names_a_place_to_look_up(
    run: Run, old: Path, tmp_path: Path, commands: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*words: object, **options: object) -> None:
        raise AssertionError("a file made the tool reach for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tensors, metadata = read_tensors(old / "finished/best.safetensors")
    assert metadata is not None
    file = tmp_path / "elsewhere.safetensors"
    save_tensors(file, tensors, {**metadata, "architecture": name})
    for words in commands(file):
        result = run(*words)
        expected = f"has metadata that do not fit: architecture: expected a network that timm registers, got {name!r}"
        assert result.code == 2 and expected in result.err, (words, result.err)
    teacher = {**metadata["teacher"], "name": name, "checkpoint": None}
    save_tensors(file, tensors, {**metadata, "teacher": teacher})
    for words in (("inspect-graph", file, *INSPECT), ("inspect-graph", file, "--plan-only")):
        result = run(*words)
        assert result.code == 2 and f"names its teacher {name}, which a file cannot have looked up" in result.err
