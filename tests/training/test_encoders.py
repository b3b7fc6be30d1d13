"""Teachers without a classifier, or with other classes: every kind of encoder, with labels and without."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import Result, records, three_colours
from torch import Tensor, nn

from irgdistill import Distiller
from irgdistill.graph import edge_matrix
from irgdistill.io.tensors import save_tensors
from irgdistill.losses.adapters import Projector
from irgdistill.losses.terms.embedding import centred_cosine, queue_similarity
from irgdistill.matching.taps import Tapped
from irgdistill.models.build import build_network
from irgdistill.models.checkpoint import describe
from irgdistill.training.held_out import compare
from irgdistill.training.probes import knn_top1

Run = Callable[..., Result]
SMALL = ("--student", "cifar_resnet14_x0_5", "--input-size", 16, "--batch-size", 16, "--workers", 0, "--device", "cpu")
SMALL += ("--lr", 0.01, "--set", "runtime.log_every=1")

# --- the term ---------------------------------------------------------------------------------------------------------


def test_the_centred_cosine_by_a_loop() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5, dtype=torch.float64) + 3, torch.randn(6, 5, dtype=torch.float64) - 2
    own, other = student - student.mean(0), teacher - teacher.mean(0)
    expected = sum(1 - a @ b / (a.norm() * b.norm()) for a, b in zip(own, other, strict=True)) / 6
    torch.testing.assert_close(centred_cosine(student, teacher), expected)
    torch.testing.assert_close(centred_cosine(teacher * 2 + 1, teacher), torch.zeros((), dtype=torch.float64))


def test_similarities_to_the_queue_by_a_loop() -> None:
    torch.manual_seed(1)
    student, teacher, anchors = (torch.randn(n, 5, dtype=torch.float64) for n in (3, 3, 7))
    valid = torch.tensor([True, True, False, True, True, False, True])
    mean = anchors[valid].mean(0)
    expected = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        p, q = (
            F.softmax(torch.stack([F.cosine_similarity(x - mean, a - mean, dim=0) for a in anchors[valid]]) / 0.07, 0)
            for x in (t, s)
        )
        expected += (p * (p / q).log()).sum() / 3
    torch.testing.assert_close(queue_similarity(student, teacher, anchors, valid), expected)
    assert queue_similarity(teacher, teacher, anchors, valid) == 0


def test_the_projector_learns_and_the_queue_is_in_its_state() -> None:
    projector = Projector(4, 6, 8)
    assert set(projector.state_dict()) == {
        "linear.weight",
        "linear.bias",
        "queue.teacher",
        "queue.filled",
        "queue.start",
    }
    assert "queue.teacher" not in Projector(4, 6).state_dict()


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "test_vit", "test_efficientnet", "test_convnext"]
)
def test_the_embedding_is_the_input_of_the_classifier(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        output = Tapped(model, None, embedding="auto")(images)
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(output.embedding, expected)
        torch.testing.assert_close(model.get_classifier()(output.embedding), output.logits)
        model.reset_classifier(0)
        torch.testing.assert_close(Tapped(model, None, embedding="auto")(images).embedding, model(images))


def test_tokens_are_pooled_as_asked() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        tokens = model.forward_features(images)
        cls, mean = tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(1)
        for pooling, expected in (("cls", cls), ("mean", mean), ("cls+mean", torch.cat([cls, mean], 1))):
            found = Tapped(model, None, embedding=pooling)  # type: ignore[arg-type]
            torch.testing.assert_close(found(images).embedding, expected)
            found.release()


def test_a_module_of_ones_own_has_an_embedding_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 2))
    images = torch.randn(2, 3, 8, 8)
    output = Tapped(net, None, embedding="auto")(images)
    torch.testing.assert_close(output.embedding, net[:4](images))
    output = Tapped(net[:3], None, embedding="auto")(images)
    torch.testing.assert_close(output.embedding, net[:3](images))


# --- kinds of encoders; all families of timm are in benchmarks/encoders.py --------------------------------------------


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "none"])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "cifar_resnet20"])
def test_the_student_learns_from_any_encoder(name: str, labelled: bool) -> None:
    """Two steps by the recipe for encoders: finite, with a gradient at the student's first layer."""
    _two_steps(name, labelled)


def _two_steps(name: str, labelled: bool) -> None:
    torch.manual_seed(0)
    teacher = build_network(name, num_classes=0)
    student: Any = timm.create_model("test_efficientnet", num_classes=3 if labelled else 0)
    settings = {} if labelled else {"losses.ce.weight": 0}
    distiller = Distiller(teacher.model, student, settings=settings)
    assert distiller.config.method == "encoder"
    images, labels = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for _ in range(2):
        seen = F.interpolate(images, teacher.input.size)
        loss, terms = distiller(images, labels, seen)
        loss.backward()
        assert loss.isfinite() and all(value.isfinite() for value in terms.values())
        assert student.conv_stem.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
    assert {"embedding", "edges"} <= set(terms)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network without a classifier."""
    torch.manual_seed(0)
    network = build_network("cifar_resnet20", num_classes=0, input_size=(16, 16))
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_tensors(path, dict(network.model.state_dict()), describe(network, []))
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_colours(tmp_path_factory.mktemp("photos"))


def test_with_labels_the_student_has_the_datas_classes(run: Run, encoder: Path, photos: Path, tmp_path: Path) -> None:
    options = ("--data", photos, "--teacher-checkpoint", encoder, *SMALL, "--epochs", 1)
    result = run("distill", *options, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    assert "method encoder: the teacher has no classifier, so no logits are compared" in result.err
    [train, *_] = records(tmp_path / "run", "train")
    assert set(train["terms"]) == {"ce", "edges", "transform", "positions", "embedding"}
    [metrics] = records(tmp_path / "run", "eval")
    assert "top1" in metrics and "neighbours" not in metrics
    assert run("eval", tmp_path / "run", "--workers", 0).code == 0
    for method in ("kd", "irg", "mtk", "irg+kd+at"):
        refused = run("distill", *options, "--method", method, "--output", tmp_path / "refused")
        assert refused.code == 2 and "irgdistill train" in refused.err and "--method encoder" in refused.err
        assert refused.err.count("\n") == 1


def test_without_labels_progress_is_measured(run: Run, encoder: Path, photos: Path, tmp_path: Path) -> None:
    """The numbers of the last epoch are those of the saved student, computed here by themselves."""
    options = ("--data", photos, "--no-labels", "--teacher-checkpoint", encoder, *SMALL, "--epochs", 2, "--mixup", 0.2)
    result = run("distill", *options, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    last = records(tmp_path / "run", "eval")[-1]
    assert {"knn_top1", "teacher_knn_top1", "neighbours", "edge_correlation", "embedding_cosine"} < set(last)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last_knn_top1"] == last["knn_top1"] and "top1" not in summary and "agreement" not in summary

    student = timm.create_model("cifar_resnet14_x0_5", num_classes=0).eval()
    student.load_state_dict(load_file(tmp_path / "run" / "last.safetensors"))
    teacher = timm.create_model("cifar_resnet20", num_classes=0).eval()
    teacher.load_state_dict(load_file(encoder))
    from irgdistill.config.loading import load_config
    from irgdistill.data import UnreadableImages, eval_loader, open_splits
    from irgdistill.models import open_network

    network, _ = open_network(str(tmp_path / "run" / "last.safetensors"), None, None)
    data = load_config(flags={"data.source": str(photos), "data.workers": 0}).data
    loader = eval_loader(open_splits(data), data, network.input, torch.device("cpu"), UnreadableImages(0))
    [(images, labels)] = loader.epoch()
    own, other = (model(network.preprocess()(images)).detach() for model in (student, teacher))
    assert last["knn_top1"] == pytest.approx(knn_top1(own, labels, own, labels, k=7, leave_one_out=True))
    assert last["teacher_knn_top1"] == pytest.approx(knn_top1(other, labels, other, labels, k=7, leave_one_out=True))
    correlation = torch.corrcoef(torch.stack([edge_matrix(x)[~torch.eye(24).bool()] for x in (own, other)]))[0, 1]
    assert last["edge_correlation"] == pytest.approx(float(correlation), abs=1e-4)
    # What was trained is used by the other commands.
    assert run("export", tmp_path / "run", "--output", tmp_path / "hub").code == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "k-NN top-1 %" in card and "accuracy\n" not in card.partition("\n---\n")[0]
    refused = run("eval", tmp_path / "run", "--workers", 0)
    assert refused.code == 2 and "--probe knn" in refused.err and refused.err.count("\n") == 1
    probed = run("eval", tmp_path / "run", "--workers", 0, "--probe", "knn", "--json")
    assert probed.code == 0 and "knn_top1" in json.loads(probed.out), probed.err


@pytest.mark.parametrize("method", ["rkd", "at", "fitnet", "sp", "pkt", "positions"])
def test_the_best_is_never_chosen_by_a_constant(
    run: Run, encoder: Path, photos: Path, tmp_path: Path, method: str
) -> None:
    options = ("--data", photos, "--no-labels", "--teacher-checkpoint", encoder, *SMALL, "--epochs", 1)
    result = run("distill", *options, "--method", method, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    [metrics] = records(tmp_path / "run", "eval")
    assert metrics["knn_top1"] > 0 and "agreement" not in metrics
    assert "0 classes" not in result.err


def test_unlabelled_validation_compares_neighbours(run: Run, encoder: Path, photos: Path, tmp_path: Path) -> None:
    options = ("--data", photos / "train", "--no-labels", "--teacher-checkpoint", encoder, *SMALL, "--epochs", 1)
    options += ("--val-fraction", 0.25)
    result = run("distill", *options, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    assert "shared neighbours" in result.err and "54 images to train on, 18 for validation" in result.err
    [metrics] = records(tmp_path / "run", "eval")
    assert "knn_top1" not in metrics and 0 < metrics["neighbours"] < 100
    shown = run("eval", tmp_path / "run", "--workers", 0)
    assert shown.code == 2 and "--probe knn" in shown.err and "--against" not in shown.err
    for method in ("kd", "irg", "mtk", "irg+kd+at"):
        refused = run("distill", *options, "--method", method, "--output", tmp_path / "refused")
        assert refused.code == 2 and refused.err.count("\n") == 1 and "no classifier" in refused.err


@pytest.mark.parametrize("form", ["cosine", "queue"])
def test_from_a_cache(run: Run, encoder: Path, photos: Path, tmp_path: Path, form: str) -> None:
    given = ("--data", photos, "--teacher-checkpoint", encoder, *SMALL)
    given = tuple(x for x in given if x not in ("--set", "runtime.log_every=1", "--lr", 0.01))
    cached = run("cache-teacher", *given, "--store", "fp32", "--output", tmp_path / "cache")
    assert cached.code == 0, cached.err
    options = (*given, "--epochs", 1, "--lr", 0.01, "--set", f"losses.embedding.form={form}")
    options += ("--set", "losses.embedding.queue=24", "--set", "data.views=1")
    for name, extra in (("live", ()), ("cached", ("--teacher-cache", tmp_path / "cache"))):
        result = run("distill", *options, *extra, "--output", tmp_path / name)
        assert result.code == 0, result.err
    live, replayed = (records(tmp_path / name, "train")[-1]["loss"] for name in ("live", "cached"))
    assert replayed == pytest.approx(live, rel=1e-4)
    other = run("distill", *options, "--teacher-cache", tmp_path / "cache", "--set", "teacher.pooling=mean")
    assert other.code == 2 and "teacher.pooling = mean" in other.err


def test_a_tenth_of_the_labels(run: Run, encoder: Path, photos: Path, tmp_path: Path) -> None:
    options = ("--data", photos, "--teacher-checkpoint", encoder, *SMALL, "--epochs", 1)
    part = ("--set", "data.labelled_fraction=0.25")
    result = run("distill", *options, *part, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    assert "72 images of 3 classes to train on (18 of them with their label), 24 for validation" in result.err
    assert all(math.isfinite(record["loss"]) for record in records(tmp_path / "run", "train"))
    for other, named in (
        ("--balanced", "--balanced"),
        ("--mixup=0.2", "--mixup"),
        ("--method=rocket", "losses.rocket"),
    ):
        refused = run("distill", *options, *part, other, "--output", tmp_path / "refused")
        assert refused.code == 2 and f"labelled_fraction = 0.25: {named}" in refused.err, refused.err


def test_the_mean_over_labelled_images_does_not_depend_on_the_others() -> None:
    from irgdistill.config.schema import LossesConfig
    from irgdistill.losses.base import Batch
    from irgdistill.losses.objective import build_loss
    from irgdistill.matching.taps import Output

    torch.manual_seed(0)
    logits, labels = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0, -1, 2, -1, -1, 1, -1, -1])
    loss = build_loss(LossesConfig(), None, labelled_share=0.25)
    expected = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / (8 * 0.25)
    torch.testing.assert_close(loss(Batch(Output(logits, {}), labels))["ce"], expected)


def test_graphs_without_a_choice_of_neighbours_are_zero() -> None:
    two = torch.randn(2, 3)
    assert compare(two, two) == {"edge_correlation": 0.0, "neighbours": 0.0}
    many: Tensor = torch.randn(12, 3)
    assert compare(many, many * 3 + 1)["neighbours"] == 100
