"""The main job on the real images and teachers that lie beside the project."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, shared

TRAIN, VAL = 960, 500
"""Images used, class-balanced: enough to see the student learn, few enough for a test."""


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An even selection of the real images, as an ImageFolder."""
    archive = shared("data/cifar10.tar.xz")
    root = tmp_path_factory.mktemp("cifar")
    counts: dict[str, int] = {}
    limits = {"train": TRAIN // 10, "val": VAL // 10}
    with tarfile.open(archive) as tar:
        for member in tar:
            folder = str(Path(member.name).parent)
            split = next((s for s in limits if f"{s}/" in member.name), None)
            if member.isfile() and split and counts.get(folder, 0) < limits[split]:
                counts[folder] = counts.get(folder, 0) + 1
                tar.extract(member, root, filter="data")
    assert len(counts) == 20 and sum(counts.values()) == TRAIN + VAL
    return next(path.parent for path in root.rglob("train"))


@pytest.mark.slow
def test_public_teachers_reach_their_accuracy(run: Callable[..., Result], cifar: Path) -> None:
    for name, published in (("cifar_resnet20", 88.5), ("cifar_resnet56", 89.9)):
        weights = shared(f"weights/{name}.safetensors")
        result = json.loads(run("eval", name, "--checkpoint", weights, "--data", cifar, "--json").out)
        assert result["images"] == VAL
        assert result["top1"] == pytest.approx(published, abs=5.0), "500 images: three standard errors"


@pytest.mark.slow
def test_distillation_on_real_images(run: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    result = run(
        "distill",
        *("--teacher", "cifar_resnet20", "--teacher-checkpoint", shared("weights/cifar_resnet20.safetensors")),
        *("--student", "cifar_resnet20_x0_5", "--data", cifar, "--epochs", 3, "--batch-size", 48, "--lr", 0.05),
        *("--set", "runtime.log_every=10", "--output", tmp_path / "run"),
    )
    assert result.code == 0, result.err
    evaluated = json.loads(run("eval", tmp_path / "run", "--json").out)
    print("TOP1", evaluated["top1"])
    assert evaluated["top1"] > 15, "chance is 10"
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    for term in ("ce", "kd", "edges", "transform", "attention"):
        values = [record["terms"][term] for record in train if term in record["terms"]]
        assert values[-1] < values[0], term
    assert set(train[0]["terms"]) - set(train[-1]["terms"]) == {"attention"}, "it fades out on the way"
