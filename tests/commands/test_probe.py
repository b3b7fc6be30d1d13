"""`irgdistill eval --probe`: classifiers on embeddings, with the teacher's score beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import SMALL, Run
from torch import Tensor

from irgdistill.io import save_tensors
from irgdistill.models import build_network, describe
from irgdistill.training import knn_top1, linear_top1

COLOURS = {"red": 24, "green": 24, "blue": 24}


@pytest.fixture
def student(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> Path:
    """Run folder of a student that has learnt little, without labels."""
    options = ("--student", "cifar_resnet14_x0_5", "--data", folder, *SMALL, "--epochs", 1, "--lr", 1e-6, "--no-labels")
    result = run("distill", "--teacher-checkpoint", teacher, *options, "--output", tmp_path / "student")
    assert result.code == 0, result.err
    return tmp_path / "student"


def embedded(run: Run, network: Path, images: Path, output: Path) -> tuple[Tensor, Tensor]:
    """Embeddings and labels, by `irgdistill embed` and the names of the folders."""
    output = output.with_suffix(".safetensors")
    assert run("embed", network, "--data", images, "--output", output, "--workers", 0).code == 0
    tensors = load_file(output)
    joined = tensors["names"].numpy().tobytes()
    names = [os.fsdecode(joined[a:b]) for a, b in pairwise(tensors["name_offsets"].tolist())]
    return tensors["embeddings"], torch.tensor([sorted(COLOURS).index(Path(name).parent.name) for name in names])


@pytest.mark.parametrize(("kind", "score"), [("knn", knn_top1), ("linear", linear_top1)])
def test_it_is_fitted_to_training_images_and_scored_on_the_others(
    run: Run, student: Path, teacher: Path, folder: Path, tmp_path: Path, kind: str, score: Callable[..., float]
) -> None:
    """The run had no labels: the folders give them. Beside it, the teacher that the run records."""
    rng = np.random.default_rng(0)
    for path in sorted(folder.rglob("*.png")):  # the colours are hard to see
        noise, share = rng.integers(0, 255, (16, 16, 3)), rng.uniform(0, 0.2)
        Image.fromarray(((1 - share) * noise + share * np.asarray(Image.open(path))).astype(np.uint8)).save(path)
    found = json.loads(run("eval", student, "--probe", kind, "--workers", 0, "--json").out)
    wanted = []
    for network in (student, teacher):
        parts = [
            embedded(run, network, folder / name, tmp_path / f"{network.name}-{name}") for name in ("train", "val")
        ]
        wanted.append(score(*parts[0], *parts[1]))
    assert [found[f"{kind}_top1"], found[f"teacher_{kind}_top1"]] == pytest.approx(wanted)
    assert min(wanted) > 33 and max(wanted) < 100 and wanted[0] != wanted[1]
    assert found["images"] == 24 and found["training_images"] == 72
    assert "top1" not in found and found["data"] == str(folder)


def test_a_table_of_several_and_a_teacher_that_is_gone(
    run: Run, student: Path, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    shown = run("eval", student, teacher, "--data", folder, "--probe", "knn", "--workers", 0)
    assert shown.code == 0 and "k-NN top-1 %" in shown.out and "teacher's k-NN top-1 %" in shown.out
    named = run("eval", teacher, "--data", folder, "--probe", "knn", "--against", student, "--workers", 0, "--json")
    own = run("eval", student, "--data", folder, "--probe", "knn", "--against", student, "--workers", 0, "--json")
    assert json.loads(named.out)["teacher_knn_top1"] == json.loads(own.out)["knn_top1"]
    shutil.copytree(teacher, tmp_path / "teacher")
    options = ("--student", "cifar_resnet14_x0_5", "--data", folder, *SMALL, "--epochs", 1, "--skip-teacher-check")
    taught = ("distill", "--teacher-checkpoint", tmp_path / "teacher", *options, "--output", tmp_path / "orphan")
    assert run(*taught).code == 0
    shutil.rmtree(tmp_path / "teacher")
    orphan = run("eval", tmp_path / "orphan", "--probe", "knn", "--workers", 0, "--json")
    assert orphan.code == 0 and "the teacher's own score is left out: " in orphan.err
    assert "teacher_knn_top1" not in json.loads(orphan.out)


def test_an_encoder_has_no_other_score(run: Run, folder: Path, tmp_path: Path) -> None:
    network = build_network("cifar_resnet14_x0_5", num_classes=0, input_size=(16, 16))
    path = tmp_path / "encoder.safetensors"
    save_tensors(path, network.model.state_dict(), describe(network, []))
    refused = run("eval", path, "--data", folder)
    assert refused.code == 2 and "has no classifier; --probe knn classifies by its embeddings" in refused.err
    assert 0 < json.loads(run("eval", path, "--data", folder, "--probe", "knn", "--json").out)["knn_top1"] <= 100
    unknown = run("eval", path, "--data", folder, "--probe", "kmn")
    assert unknown.code == 2 and "--probe kmn: expected knn or linear; did you mean knn?" in unknown.err
