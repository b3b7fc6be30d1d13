"""A teacher whose classes are in another order than the data's, or more: its logits come out in the data's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import SMALL, Run, records, write_images

from irgdistill.config.loading import load_config
from irgdistill.errors import UserError
from irgdistill.io.tensors import save_tensors
from irgdistill.models import build_network, describe, put_in_order, restore
from irgdistill.training.setup import Setup, prepare

NAME = "cifar_resnet14_x0_5"
DATA = ["blue", "green", "red"]
ORDERS = {"permuted": ["red", "blue", "green"], "more": ["yellow", "red", "blue", "grey", "green"]}


def reordered(teacher: Path, path: Path, names: list[str]) -> Path:
    """The checkpoint of `teacher` with its classes in another order; those it does not know have zeros."""
    network = restore(teacher / "best.safetensors")[0]
    weights = dict(network.model.state_dict())
    for key in ("fc.weight", "fc.bias"):
        own = weights[key]
        rows = [own[DATA.index(name)] if name in DATA else torch.zeros_like(own[0]) for name in names]
        weights[key] = torch.stack(rows)
    save_tensors(path, weights, describe(network, names) | {"num_classes": len(names)})
    return path


def words(checkpoint: Path, folder: Path, *more: object) -> tuple[object, ...]:
    return ("--teacher-checkpoint", checkpoint, "--student", NAME, "--data", folder, "--epochs", 1, *SMALL, *more)


def opened(checkpoint: Path, folder: Path, **more: Any) -> Setup:
    flags = {"teacher.checkpoint": str(checkpoint), "student.name": NAME, "data.source": str(folder), **more}
    return prepare(load_config(flags=flags))


@pytest.mark.parametrize("order", ORDERS)
def test_the_logits_are_in_the_datas_order(run: Run, teacher: Path, folder: Path, tmp_path: Path, order: str) -> None:
    path = reordered(teacher, tmp_path / "other.safetensors", ORDERS[order])
    result = run("distill", *words(path, folder, "--output", tmp_path / "run"))
    assert result.code == 0, result.err
    left = "its classes are put in the order of the data's"
    if order == "more":
        left = "of its 5 classes, the 3 of the data are left, in the data's order"
    said = result.err.replace("\n  ", " ")
    assert said.index(f"{NAME}: {left}\n") < said.index("method irg+kd+at: the teacher has the data's classes\n")
    assert records(tmp_path / "run", "teacher")[0]["top1"] == 100
    images = torch.rand(4, 3, 16, 16)
    own, other = restore(teacher / "best.safetensors")[0], opened(path, folder).teachers[0].network
    assert torch.equal(own.model.eval()(images), other.model.eval()(images))
    assert other.classes == DATA and other.num_classes == 3


def test_the_order_is_part_of_the_checksum_of_a_run(teacher: Path, folder: Path, tmp_path: Path) -> None:
    """By which a run that resumes knows its teacher."""
    known = {str(opened(teacher / "best.safetensors", folder).checksums)}
    path = tmp_path / "other.safetensors"
    for names in ORDERS.values():
        known.add(str(opened(reordered(teacher, path, names), folder).checksums))
    assert len(known) == 1
    values = load_file(path)
    network = restore(path)[0]
    save_tensors(path, values, describe(network, ["red", "yellow", "blue", "grey", "green"]))
    assert str(opened(path, folder).checksums) not in known


def test_a_cache_holds_the_logits_in_the_datas_order(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    path = reordered(teacher, tmp_path / "other.safetensors", ORDERS["more"])
    still = ("--set", "augment.hflip=0", "--method", "irg")
    shards = []
    for name, checkpoint in (("own", teacher / "best.safetensors"), ("other", path)):
        made = run("cache-teacher", *words(checkpoint, folder, *still, "--output", tmp_path / name))
        assert made.code == 0 and ("in the data's order" in made.err) == (name == "other"), made.err
        assert json.loads((tmp_path / name / "cache.json").read_text())["classes"] == DATA
        shards.append(load_file(tmp_path / name / "00000.safetensors"))
    assert all(torch.equal(shards[0][key], shards[1][key]) for key in shards[0])
    train = ("distill", "--teacher-cache", tmp_path / "other", *words(path, folder, "--set", "augment.hflip=0"))
    assert run(*train, "--dry-run").code == 0
    reordered(teacher, path, ["grey", "red", "blue", "yellow", "green"])
    assert run(*train, "--dry-run").code == 0, "the same logits for these classes"
    save_tensors(path, load_file(path), describe(restore(path)[0], ["green", "red", "blue", "yellow", "grey"]))
    refused = run(*train, "--dry-run")
    assert refused.code == 2 and "was made of another teacher: weights" in refused.err


def test_eval_compares_the_same_classes(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    path = reordered(teacher, tmp_path / "other.safetensors", ORDERS["more"])
    result = run("eval", teacher, "--against", path, "--data", folder, "--workers", 0, "--json")
    measured = json.loads(result.out)
    assert measured["agreement"] == 100 and measured["kl"] == 0 and "in the data's order" in result.err
    reordered(teacher, path, ["red", "yellow", "green"])
    warned = run("eval", teacher, "--against", path, "--data", folder, "--workers", 0)
    assert warned.code == 0
    said = f"class 0 is 'red' for --against {NAME} and 'blue' in the data: agreement and KL compare classes by"
    assert said in warned.err.replace("\n  ", " ")
    reordered(teacher, path, ["red", "green"])
    refused = run("eval", teacher, "--against", path, "--data", folder, "--workers", 0)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert f"--against {NAME} has 2 classes and the data 3: their logits cannot be compared" in refused.err


def test_inspect_graph_compares_the_same_classes(
    run: Run, no_figures: None, teacher: Path, folder: Path, tmp_path: Path
) -> None:
    graphs = []
    for name, checkpoint in (
        ("own", teacher / "best.safetensors"),
        ("other", reordered(teacher, tmp_path / "other.safetensors", ORDERS["more"])),
    ):
        networks = ("--teacher-checkpoint", checkpoint, "--student", NAME, "--data", folder, "--input-size", 16)
        size = ("--images", 6, "--neighbours", 2, "--workers", 0, "--output", tmp_path / name)
        assert run("inspect-graph", *networks, *size).code == 0
        graphs.append(load_file(tmp_path / name / "graph.safetensors"))
    assert graphs[0].keys() == graphs[1].keys() and any("logits" in key for key in graphs[0])
    assert all(torch.equal(graphs[0][key], graphs[1][key]) for key in graphs[0])


def test_imagenets_identifiers_are_known_by_their_number(tmp_path: Path) -> None:
    classes = ["n01443537", "n01440764"]
    network = build_network("cifar_resnet14_x0_5", num_classes=1000)
    rows = network.model.fc.weight[[1, 0]]
    assert put_in_order(network, classes).startswith(f"{NAME}: of its 1,000 classes, the 2 of the data are left")
    assert torch.equal(network.model.fc.weight, rows) and network.model.fc.out_features == network.num_classes == 2


@pytest.mark.parametrize("names", [["blue", "green", "yellow"], ["blue", "green", "blue"], DATA, None])
def test_other_names_leave_the_network_as_it_is(names: list[str] | None) -> None:
    network = build_network(NAME, num_classes=3)
    network.classes, weight = names, network.model.fc.weight
    assert not put_in_order(network, DATA) and network.model.fc.weight is weight
    encoder = build_network("test_resnet", num_classes=0)
    assert not put_in_order(encoder, ["n01440764"]) and encoder.num_classes == 0


def test_without_names_another_order_is_refused_as_such(run: Run, teacher: Path, folder: Path, tmp_path: Path) -> None:
    """Chance is a third, and its own accuracy is 0."""
    weights = load_file(reordered(teacher, tmp_path / "other.safetensors", ORDERS["permuted"]))
    torch.save(weights, tmp_path / "foreign.pth")
    given = words(tmp_path / "foreign.pth", folder, "--teacher", NAME, "--teacher-input-size", 16, "--method", "kd")
    refused = run("distill", *given, "--output", tmp_path / "run")
    assert refused.code == 2
    assert (
        "top-1 0.0 on this data, chance is 33.3: its classes are in another order, under which it reaches top-1 "
        in (refused.err.replace("\n  ", " "))
    )
    assert "name the class folders so that they sort as its classes do, or give a checkpoint that names" in refused.err


def test_classes_that_the_teacher_lacks_are_refused(teacher: Path, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data" / "train", {"blue": 8, "green": 8, "violet": 8}).parent
    write_images(data / "val", {"blue": 2, "green": 2, "violet": 2})
    with pytest.raises(UserError, match="class 2 is 'red' for the teacher and 'violet' in the data"):
        opened(teacher / "best.safetensors", data, method="kd", **{"data.batch_size": 12})
