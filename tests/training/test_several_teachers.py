"""Runs with several teachers: means over them by hand, live and from caches, resumed, on two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Result, records, write_images
from support.interruption import differences, outcome
from support.processes import in_ranks, trainer_of
from torch import Tensor

from irgdistill.config import load_config, values_of
from irgdistill.io import save_tensors
from irgdistill.losses import Batch, Counterpart, build_loss, mean_logits
from irgdistill.matching.levels import Level, Tap
from irgdistill.matching.plan import Pair, Plan
from irgdistill.matching.taps import Output
from irgdistill.models import CheckpointMetadata
from irgdistill.models.build import build_network
from irgdistill.models.checkpoint import describe
from irgdistill.runtime import World
from irgdistill.training import Trainer

Run = Callable[..., Result]
NETWORKS = {
    "a": ("cifar_resnet20_x0_5", 16, 3),
    "b": ("cifar_resnet20", 24, 3),
    "encoder": ("cifar_resnet14_x0_5", 16, 0),
}
"""Name -> architecture, input size and classes of a teacher with random weights."""
QUICK = ("--student", "cifar_resnet14_x0_5", "--input-size", 16, "--batch-size", 24, "--workers", 0, "--device", "cpu")
QUICK += ("--set", "runtime.log_every=1", "--set", "runtime.gradient_shares_every=0", "--skip-teacher-check")
TERMS = {"kd": 1.0, "logits": 0.5, "edges": 5.0, "transform": 1.0, "attention": 10.0, "positions": 1.0, "pkt": 1.0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "train", {"red": 24, "green": 24, "blue": 24})
    write_images(folder / "val", {"red": 4, "green": 4, "blue": 4}, seed=1)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, paths = tmp_path_factory.mktemp("teachers"), {}
    for seed, (name, (architecture, size, classes)) in enumerate(NETWORKS.items()):
        torch.manual_seed(seed)
        network = build_network(architecture, num_classes=classes, input_size=(size, size))
        about = describe(network, ["blue", "green", "red"][:classes])
        save_tensors(path := folder / f"{name}.safetensors", dict(network.model.state_dict()), about)
        paths[name] = path
    return paths


def trainer(photos: Path, folder: Path, teachers: list[Path], **settings: Any) -> Trainer:
    """A trainer on the photos under these teachers, of weight 2, 1, 1, …."""
    flags = {"student.name": "cifar_resnet14_x0_5", "student.input_size": 24, "data.source": str(photos)}
    flags |= {"data.workers": 0, "data.batch_size": 24, "runtime.device": "cpu", "runtime.fold_batch_norm": False}
    flags |= {"teacher.checkpoint": teachers[0], "teacher.weight": 2.0}
    for number, path in enumerate(teachers[1:]):
        flags[f"teachers.{number}.checkpoint"] = path
    return trainer_of(World(), {**flags, **settings}, folder)


def first_losses(run: Trainer) -> tuple[dict[str, Tensor], Tensor]:
    """The raw terms of the first batch, and its images."""
    images, labels, *_ = next(iter(run.components.train.epoch()))
    components = run.components
    assert components.teacher is not None
    outputs = components.teacher(images)
    raw = components.loss(Batch(components.trained(images), labels, outputs[0], outputs[1:]))
    return raw, images


def weights(names: dict[str, float]) -> dict[str, float]:
    return {f"losses.{name}.weight": weight for name, weight in names.items()}


# --- means ------------------------------------------------------------------------------------------------------------


def test_the_mean_of_logits_is_that_of_the_probabilities() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 4, dtype=torch.float64), 3 * torch.randn(5, 4, dtype=torch.float64) + 2
    mean = mean_logits([a, b], [2.0, 1.0])
    torch.testing.assert_close(mean.softmax(1), (2 * a.softmax(1) + b.softmax(1)) / 3)
    torch.testing.assert_close(mean.logsumexp(1), (2 * a.logsumexp(1) + b.logsumexp(1)) / 3)
    torch.testing.assert_close(mean_logits([a, a], [0.3, 5.0]), a)
    assert mean_logits([a.half(), b.half()], [1, 1]).dtype == torch.float32


def test_a_teacher_given_twice_is_one(photos: Path, teachers: dict[str, Path], tmp_path: Path) -> None:
    settings = {**weights(TERMS), "method": "none"}
    once, _ = first_losses(trainer(photos, tmp_path / "one", [teachers["a"]], **settings))
    twice, _ = first_losses(trainer(photos, tmp_path / "two", [teachers["a"]] * 2, **settings))
    assert set(once) == {"ce", *TERMS} and list(once) == list(twice)
    for name, value in once.items():
        assert value > 0
        torch.testing.assert_close(twice[name], value, rtol=1e-5, atol=1e-7)


def test_terms_are_weighted_means_over_the_teachers(photos: Path, teachers: dict[str, Path], tmp_path: Path) -> None:
    """Relations of all three, each with its size and normalisation; soft targets of the two with the data's classes."""
    settings: dict[str, Any] = {**weights({**TERMS, "embedding": 1.0, "fitnet": 1.0}), "method": "none"}
    run = trainer(photos, tmp_path / "all", list(teachers.values()), **settings)
    found, images = first_losses(run)
    del settings["losses.kd.weight"], settings["losses.logits.weight"]
    parts = []
    for number, path in enumerate(teachers.values()):
        alone = trainer(photos, tmp_path / path.stem, [path], **settings)
        for term in ("embedding", "fitnet"):  # drawn at random
            own = run.components.adapters[term][str(number)].state_dict()
            alone.components.adapters[term].load_state_dict(own)
        parts.append(first_losses(alone)[0])
    for term in set(found) - {"ce", "kd", "logits"}:
        a, b, c = (part[term].detach() for part in parts)
        assert len({float(a), float(b), float(c)}) == 3
        torch.testing.assert_close(found[term], (2 * a + b + c) / 4, rtol=1e-5, atol=1e-7)

    members = run.components.teacher.members  # type: ignore[union-attr]
    a, b = (member.network(images).logits for member in members[:2])  # type: ignore[misc]
    mean = ((2 * a.softmax(1) + b.softmax(1)) / 3).log()
    student = run.components.student(images).logits
    p, log_q = (mean / 4).softmax(1), (student / 4).log_softmax(1)
    torch.testing.assert_close(found["kd"], 16 * (p * (p.log() - log_q)).sum(1).mean(), rtol=1e-4, atol=1e-7)
    level = (2 * a.logsumexp(1) + b.logsumexp(1)) / 3
    torch.testing.assert_close(found["logits"], F.mse_loss(student, mean + level[:, None]), rtol=1e-4, atol=1e-7)


def test_a_term_that_one_teacher_does_not_allow_is_of_the_others() -> None:
    """Two blocks of different widths have no transformation."""

    def pair(teacher: tuple[int, int]) -> Pair:
        taps = [tuple(Tap(f"{i}", c, 8, 8, "NCHW") for i, c in enumerate(widths)) for widths in (teacher, (4, 4))]
        return Pair("/4", *(Level(2, both[0], both[1], "block", both) for both in taps))

    widths_of = ((6, 6), (6, 8), (5, 5))
    plans = [Plan((pair(widths),)) for widths in widths_of]
    torch.manual_seed(0)
    outputs = [Output(torch.randn(6, 3), {"0": torch.randn(6, a), "1": torch.randn(6, b)}) for a, b in widths_of]
    student = Output(torch.randn(6, 3), {"0": torch.randn(6, 4), "1": torch.randn(6, 4)})
    config = load_config(flags={"method": "none", **weights({"transform": 1.0, "edges": 1.0})}).losses
    others = [Counterpart(plans[1], weight=3.0), Counterpart(plans[2], weight=2.0)]
    loss = build_loss(config, plans[0], weight=2.0, others=others)
    assert [note for note in loss.notes if "transform" in note] == [
        "teacher 2: no transformation term: no matched stage has two taps of equal width in both networks"
    ]
    assert [len(loss.where("teacher", number)["taps"]) for number in range(3)] == [2, 1, 2]
    found = loss(Batch(student, torch.zeros(6, dtype=torch.long), outputs[0], outputs[1:]))
    alone = [
        build_loss(config, plan)(Batch(student, torch.zeros(6, dtype=torch.long), output))
        for plan, output in zip(plans, outputs, strict=True)
    ]
    torch.testing.assert_close(found["transform"], (alone[0]["transform"] + alone[2]["transform"]) / 2)
    edges = [each["edges"] for each in alone]
    torch.testing.assert_close(found["edges"], (2 * edges[0] + 3 * edges[1] + 2 * edges[2]) / 7)


# --- runs -------------------------------------------------------------------------------------------------------------


def terms_of(folder: Path) -> Tensor:
    return torch.tensor([[record["loss"], *record["terms"].values()] for record in records(folder, "train")])


def test_caches_and_live_teachers_are_the_same(
    run: Run, photos: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    """Both from caches, one of the two, none: the losses of an epoch, at weights that hardly change."""
    common = (*QUICK, "--data", photos, "--method", "irg+kd+at", "--set", "losses.embedding.weight=1")
    common += ("--set", "losses.attention.fade=1,1")
    paths = {"a": tmp_path / "cache-a", "b": tmp_path / "cache-b"}
    both = ("--teacher-checkpoint", teachers["a"], "--teacher-checkpoint", teachers["b"])
    for name, order in (("a", both), ("b", (*both[2:], *both[:2]))):
        result = run("cache-teacher", *common, *order, "--views", 1, "--store", "fp32", "--output", paths[name])
        assert result.code == 0, result.err
    assert json.loads((paths["a"] / "cache.json").read_text())["views"]["size"] == [24, 24], "the larger teacher's"

    train = ("distill", *common, "--epochs", 1, "--lr", 1e-6, "--set", "data.views=1", "--set", "data.view_seed=0")
    caches = ("--teacher-cache", paths["a"], "--teacher-cache")
    cases = {"live": both, "mixed": (*both, *caches, "none"), "cached": (*caches, paths["b"])}
    for name, options in cases.items():
        assert (result := run(*train, *options, "--output", tmp_path / name)).code == 0, result.err
    live = terms_of(tmp_path / "live")
    assert live.shape == (3, 7)
    for name in ("mixed", "cached"):
        torch.testing.assert_close(terms_of(tmp_path / name), live, rtol=2e-5, atol=2e-5)

    for views, words in (("--views", "hold different views: views 1 and 2"), ("--seed", "seed 0 and 2")):
        options = (*both[2:], *both[:2], views, 2, "--output", tmp_path / f"other{views}")
        assert run("cache-teacher", *common, *options).code == 0
        refused = run(*train, *caches, tmp_path / f"other{views}", "--output", tmp_path / "refused")
        assert refused.code == 2 and refused.err.count("\n") == 1 and words in refused.err, refused.err


def test_a_resumed_run_is_the_same_bit_for_bit(
    run: Run, photos: Path, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an epoch; the second teacher's file has moved meanwhile."""
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(teachers["b"].read_bytes())
    options = ("distill", *QUICK, "--data", photos, "--teacher-checkpoint", teachers["encoder"], "--epochs", 2)
    options += ("--teacher-checkpoint", teachers["b"], "--teacher-weight", 2, "--teacher-weight", 0.5)
    options += ("--set", "losses.embedding.form=queue", "--set", "losses.embedding.queue=40", "--lr", 0.01)
    assert (whole := run(*options, "--output", tmp_path / "whole")).code == 0, whole.err
    assert "method encoder: teacher 1, cifar_resnet14_x0_5, has no classifier" in whole.err

    steps, train_step = 0, Trainer.train_step

    def interrupted(self: Trainer, *batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            self.signals.received = 15
        return train_step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert run(*options, "--output", tmp_path / "stopped").code == 143
    resume = ("distill", "--resume", tmp_path / "stopped", "--teacher-checkpoint", "none")
    other = run(*resume, "--teacher-checkpoint", teachers["a"])
    assert other.code == 2 and "teacher is not the one" in other.err and other.err.count("\n") == 1
    assert run(*resume, "--teacher-weight", 1, "--teacher-weight", 2).code == 2, "weights do not change"
    assert (resumed := run(*resume, "--teacher-checkpoint", moved)).code == 0, resumed.err
    ignored = ("checkpoint", "state config.teachers")
    found = differences(outcome(tmp_path / "whole"), outcome(tmp_path / "stopped"))
    assert [name for name in found if not any(word in name for word in ignored)] == []

    metadata = CheckpointMetadata.read(tmp_path / "whole" / "last.safetensors")
    assert metadata is not None and metadata.teacher is not None
    assert (metadata.teacher.architecture, metadata.teacher.weight) == ("cifar_resnet14_x0_5", 2)
    [second] = metadata.teachers
    assert (second.architecture, second.weight, second.checkpoint) == ("cifar_resnet20", 0.5, str(teachers["b"]))
    shown = run("inspect-graph", tmp_path / "whole", "--plan-only")
    assert shown.code == 0 and "the teacher is the first of 2" in shown.err


def _steps(world: World, teachers: list[Path], photos: Path, folder: Path) -> dict[str, Tensor]:
    """Student and projectors after two updates in float64, with all batch norms synchronised."""
    torch.set_default_dtype(torch.float64)
    flags = {"student.name": "cifar_resnet14_x0_5", "student.input_size": 16, "data.source": str(photos)}
    flags |= {"data.workers": 0, "data.batch_size": 24, "runtime.device": "cpu", "runtime.sync_bn": True}
    flags |= {"teacher.checkpoint": str(teachers[0]), "teachers.0.checkpoint": str(teachers[1]), "schedule.epochs": 1}
    flags |= {"optim.lr": 1e-3, "method": "none", **weights({"kd": 1.0, "edges": 5.0, "embedding": 1.0})}
    run = trainer_of(world, flags, folder)
    for images, labels in run.components.train.epoch():
        run.train_step(images, labels)
        if run.progress.update == 2:
            break
    return {name: value.clone() for name, value in run.components.trained.state_dict().items()}


def test_two_processes_train_the_same(teachers: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    given = [teachers["a"], teachers["b"]]
    try:
        alone = _steps(World(), given, photos, tmp_path / "run")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {name for name in alone if "linear.weight" in name} == {
        "adapters.embedding.0.linear.weight",
        "adapters.embedding.1.linear.weight",
    }
    for found in in_ranks(2, tmp_path / "2", _steps, given, photos, tmp_path / "run"):
        for name, value in alone.items():
            torch.testing.assert_close(found[f"module.{name}"], value, rtol=1e-8, atol=1e-10)


def test_without_labels_the_first_teacher_is_the_measure(
    run: Run, photos: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    options = ("distill", *QUICK, "--data", photos, "--no-labels", "--epochs", 1, "--output", tmp_path / "run")
    two = ("--teacher-checkpoint", teachers["encoder"], "--teacher-checkpoint", teachers["a"])
    assert (result := run(*options, *two)).code == 0, result.err
    [metrics] = records(tmp_path / "run", "eval")
    assert {"knn_top1", "teacher_knn_top1", "embedding_cosine"} < set(metrics)
    settings = {"data.labels": False, "student.input_size": 16}
    first = trainer(photos, tmp_path / "other", [teachers["encoder"]], **settings).components
    assert first.held_out is not None
    found = first.held_out.measure(first.evaluated, first.projector)
    assert found.teacher_knn_top1 == pytest.approx(metrics["teacher_knn_top1"], abs=1e-4)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--teacher", "a", "--teacher", "b", "--teacher-cache", "c"], ["--teacher 2 times, --teacher-cache 1 time"]),
        (["--teacher", "a", "--teacher", "b", "--teacher-weight", "1"], ["the n-th value is the n-th teacher's"]),
        (["--teacher", "none", "--teacher", "none"], ["needs a teacher"]),
        (["--teacher", "a", "--set", "teachers.1.name=b"], ["teachers.1.name", "is teachers.0"]),
        (["--teacher", "a", "--set", "teachers.0.weight=2"], ["teachers.0 is no network"]),
        (["--teacher", "a", "--set", "teachers.0.weight=0"], ["teachers.0.weight = 0", "greater than 0"]),
        (["--teacher", "a", "--set", "teachers.0.nam=b"], ["unknown key 'teachers.0.nam'"]),
        (["--teacher", "a", "--set", "teachers=b"], ["teachers = 'b'"]),
        (["--teacher", "a", "--teacher", "b", "--teacher-weight", "1", "--teacher-weight", "x"], ["teachers.0.weight"]),
        (["--teacher", "resnet18", "--teacher", "b", "--teacher-cache", "none", "--teacher-cache", "c"], ["no file c"]),
    ],
)
def test_options_that_do_not_fit(run: Run, photos: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    result = run("distill", "--data", photos, "--student", "test_vit", "--output", tmp_path / "run", *options)
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert all(word in result.err for word in words), result.err


def test_every_teacher_is_checked(run: Run, photos: Path, teachers: dict[str, Path], tmp_path: Path) -> None:
    options = ("distill", *QUICK[:-1], "--data", photos, "--teacher-checkpoint", teachers["encoder"], "--epochs", 1)
    options += ("--output", tmp_path / "run")
    both = ("--teacher-checkpoint", teachers["b"], "--teacher-input-size", 16, "--teacher-input-size", "24")
    result = run(*options, *both)
    assert result.code == 2 and "the teacher reaches top-1" in result.err, result.err
    refused = run(*options, "--teacher-checkpoint", teachers["encoder"], "--method", "kd")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "teacher 1, cifar_resnet14_x0_5, has no classifier and teacher 2" in refused.err
    gone = run(*options, "--teacher-checkpoint", tmp_path / "gone.safetensors")
    assert gone.code == 2 and "no file" in gone.err


def test_options_in_python_and_in_files(tmp_path: Path) -> None:
    given = values_of({"teacher": ["a", "b"], "teacher_input_size": ["32", "none"], "teacher_weight": [1.0, 3.0]})
    config = load_config(flags=given)
    assert [(t.name, t.input_size, t.weight) for t in config.all_teachers] == [("a", (32, 32), 1.0), ("b", None, 3.0)]
    assert values_of({"teacher": "a", "teacher_input_size": [32, 48]}) == {
        "teacher.name": "a",
        "teacher.input_size": [32, 48],
    }
    preset = tmp_path / "p.yaml"
    preset.write_text("teacher: {name: a}\nteachers: [{name: b}, {name: c, pooling: cls}]\n")
    config = load_config(str(preset), ["teachers.1.weight=2"], {"teachers.0.name": "d"})
    assert [(t.name, t.weight) for t in config.all_teachers] == [("a", 1), ("d", 1), ("c", 2)]
    assert config.teachers[1].pooling == "cls"
