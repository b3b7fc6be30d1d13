"""Loss terms against formulas written out by hand, and the weighted sum."""

from __future__ import annotations

import math

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from irgdistill.config.loading import load_config
from irgdistill.config.methods import DEFAULT_METHOD
from irgdistill.config.schema import LossesConfig
from irgdistill.graph import edge_loss, edge_matrix, transformation_loss, transformation_vector
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss, gradient_shares
from irgdistill.losses.terms.logits import logit_regression, soft_targets
from irgdistill.matching.levels import Level, Tap
from irgdistill.matching.plan import Pair, Plan
from irgdistill.matching.taps import Output
from irgdistill.runtime.distributed import World


def level(network: str, k: int, widths: list[int]) -> Level:
    taps = tuple(Tap(f"{network}{k}.{i}", width, 8, 8, "NCHW") for i, width in enumerate(widths))
    return Level(k, taps[0], taps[-1], "block", taps)


PLAN = Plan(
    (
        Pair("/4", level("t", 2, [6, 6]), level("s", 2, [4, 4, 4])),
        Pair("/8", level("t", 3, [7, 7]), level("s", 3, [5, 5, 5])),
    )
)


def outputs(batch: int = 6, classes: int = 10) -> tuple[Output, Output]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def network(name: str, taps: list[Tap]) -> Output:
        return Output(
            random(batch, classes), {tap.module: random(batch, tap.channels).requires_grad_() for tap in taps}
        )

    return network("s", PLAN.student_taps(3)), network("t", PLAN.teacher_taps())


def test_soft_targets_by_hand() -> None:
    student, teacher = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    temperature, total = 4.0, 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(x / temperature) for x in t]
        q = [math.exp(x / temperature) for x in s]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert soft_targets(student, teacher, temperature).item() == pytest.approx(16 * total / 3, rel=1e-5)


def test_logit_regression_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert logit_regression(student, teacher).item() == pytest.approx((4 + 9) / 4)


def test_full_loss_is_the_sum_of_weighted_means() -> None:
    student, teacher = outputs()
    targets = torch.tensor([0, 1, 2, 3, 4, 5])
    config = load_config(settings=["losses.edges.blocks=2"], flags={"method": "irg+kd"}).losses
    loss = build_loss(config, PLAN)
    raw = loss(Batch(student, targets, teacher))
    assert list(raw) == ["ce", "kd", "logits", "edges", "transform"]
    edges = [
        (edge_matrix(student.features[name]) - edge_matrix(teacher.features["t3.1"])).square().mean()
        for name in ("s3.1", "s3.2")
    ]
    assert raw["edges"].item() == pytest.approx(sum(edge.item() for edge in edges) / 2)
    moves = []
    for k in (2, 3):
        s = transformation_vector(student.features[f"s{k}.0"], student.features[f"s{k}.2"])
        t = transformation_vector(teacher.features[f"t{k}.0"], teacher.features[f"t{k}.1"])
        moves.append((s - t).square().mean().item())
    assert raw["transform"].item() == pytest.approx(sum(moves) / 2)
    weights = config.weights()
    total = loss.total(raw, loss.weights()).item()
    assert total == pytest.approx(sum(weights[name] * raw[name].item() for name in raw))


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("none", ["ce"]),
        ("kd", ["ce", "kd"]),
        ("irg", ["ce", "logits", "edges"]),
        ("mtk", ["ce", "logits", "edges", "transform"]),
        ("irg+kd", ["ce", "kd", "logits", "edges", "transform"]),
        ("kd+at", ["ce", "kd", "attention"]),
        ("irg+kd+at", ["ce", "kd", "edges", "transform", "attention"]),
    ],
)
def test_methods_are_sets_of_terms(method: str, terms: list[str]) -> None:
    assert list(build_loss(load_config(flags={"method": method}).losses, PLAN).terms) == terms


def test_labels_alone_give_plain_cross_entropy_with_mixed_targets() -> None:
    student, _ = outputs()
    mixed = torch.rand(6, 10, dtype=torch.float64)
    mixed /= mixed.sum(1, keepdim=True)
    loss = build_loss(load_config(flags={"method": "none"}).losses, None)
    expected = -(mixed * student.logits.log_softmax(1)).sum(1).mean()
    assert loss(Batch(student, mixed.float()))["ce"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_cross_entropy_is_timms(threshold: float | None) -> None:
    """With class indices, and with labels that timm's mixup has mixed and smoothed."""
    settings = {"kind": "binary", "label_smoothing": 0.1, "target_threshold": threshold}
    loss = build_loss(LossesConfig.model_validate({"ce": settings}), None)
    student, labels = outputs()[0], torch.tensor([0, 1, 2, 9, 4, 5])
    student = student._replace(logits=student.logits.float())
    timms = BinaryCrossEntropy(smoothing=0.1, target_threshold=threshold)
    assert loss(Batch(student, labels))["ce"].item() == pytest.approx(timms(student.logits, labels).item(), rel=1e-6)
    mixed, smoothed = (mixup_target(labels, 10, lam=0.7, smoothing=s) for s in (0.0, 0.1))
    expected = timms(student.logits, smoothed).item()
    assert loss(Batch(student, mixed))["ce"].item() == pytest.approx(expected, rel=1e-6)


def test_binary_cross_entropy_weighs_images_by_their_classes() -> None:
    student, labels = outputs(4, 3)[0], torch.tensor([0, 1, 2, 2])
    config = LossesConfig.model_validate({"ce": {"kind": "binary"}})
    alone = [build_loss(config, None)(Batch(_row(student, i), labels[i : i + 1]))["ce"] for i in range(4)]
    weighed = build_loss(config, None, class_weights=torch.tensor([0.5, 2.0, 1.0]))(Batch(student, labels))["ce"]
    assert weighed.item() == pytest.approx((0.5 * alone[0] + 2 * alone[1] + alone[2] + alone[3]).item() / 4, rel=1e-6)
    partly = build_loss(config, None, labelled_share=0.25)(Batch(student, torch.tensor([-1, 1, -1, -1])))["ce"]
    assert partly.item() == pytest.approx(alone[1].item(), rel=1e-6)


def _row(output: Output, i: int) -> Output:
    return Output(output.logits[i : i + 1], {})


def test_transformations_need_two_taps_of_equal_width() -> None:
    narrow = Plan((Pair("/4", level("t", 2, [6, 8]), level("s", 2, [4, 4])),))
    assert narrow.pairs[0].transformation() is None
    assert list(build_loss(load_config(flags={"method": "mtk"}).losses, narrow).terms) == ["ce", "logits", "edges"]


def test_relations_do_not_depend_on_the_batch_size() -> None:
    """Every term is a mean: the same images twice give the same edges and transformations."""
    x, y = torch.randn(8, 5), torch.randn(8, 3)
    torch.testing.assert_close(edge_loss(x.repeat(2, 1), y.repeat(2, 1)), edge_loss(x, y))
    student, teacher = (torch.randn(2, 8, 5), torch.randn(2, 8, 3))
    once = transformation_loss([tuple(student)], [tuple(teacher)])
    twice = transformation_loss([tuple(student.repeat(1, 2, 1))], [tuple(teacher.repeat(1, 2, 1))])
    torch.testing.assert_close(twice, once)


def test_gradient_shares_add_up_and_keep_the_graph() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    raw = {"ce": (3 * parameter).sum(), "kd": (4 * parameter).sum(), "edges": parameter.detach().sum()}
    shares = gradient_shares(raw, {"ce": 1.0, "kd": 0.5, "edges": 1.0}, [parameter], World())
    assert shares == pytest.approx({"ce": 0.6, "kd": 0.4, "edges": 0.0})
    sum(raw.values(), torch.zeros(())).backward()
    assert parameter.grad is not None and parameter.grad.tolist() == [7.0, 7.0]


def test_a_hint_fades_out_between_two_shares_of_the_training() -> None:
    settings = ["losses.kd.weight=2", "losses.kd.fade=0.25,0.75", "losses.logits.fade=[0.5, 0.5]"]
    loss = build_loss(load_config(settings=settings, flags={"method": "irg+kd"}).losses, PLAN)
    kd = [loss.weights(progress).get("kd") for progress in (0, 0.25, 0.5, 0.7, 0.75, 1)]
    assert kd == pytest.approx([2, 2, 1, 0.2, None, None])
    logits = [loss.weights(progress).get("logits") for progress in (0, 0.49, 0.5, 1)]
    assert logits == pytest.approx([0.1, 0.1, None, None])
    assert list(loss.weights(1)) == ["ce", "edges", "transform"]
    student, teacher = outputs()
    raw = loss(Batch(student, torch.arange(6), teacher), loss.weights(0.5))
    assert list(raw) == ["ce", "kd", "edges", "transform"]
    others = sum(loss.weights()[name] * raw[name].item() for name in ("ce", "edges", "transform"))
    assert loss.total(raw, loss.weights(0.5)).item() == pytest.approx(others + raw["kd"].item())


def test_attention_of_the_default_fades_and_can_be_kept() -> None:
    assert load_config().with_method(DEFAULT_METHOD).losses.fades() == {"attention": (0.3, 0.6)}
    assert load_config(flags={"method": "kd+at"}).losses.fades() == {}
    kept = build_loss(load_config(settings=["losses.attention.fade=1,1"]).with_method(DEFAULT_METHOD).losses, PLAN)
    assert kept.weights(0.999) == kept.weights() and "attention" in kept.weights()


def test_unset_weights_come_from_the_method_and_set_ones_win() -> None:
    unset = LossesConfig().weights()
    assert unset.pop("ce") == 1.0 and {"kd", "logits", "edges", "transform"} < set(unset) and not any(unset.values())
    config = load_config(settings=["losses.kd.weight=0.25"], flags={"method": "irg"})
    assert config.losses.weights()["kd"] == 0.25 and config.losses.weights()["edges"] > 0


@pytest.mark.parametrize(
    ("settings", "student", "teacher"),
    [
        ({"method": "kd"}, [], []),
        ({"method": "irg"}, ["s3.2"], ["t3.1"]),
        ({"method": "irg", "losses.edges.blocks": 2}, ["s3.1", "s3.2"], ["t3.1"]),
        ({"method": "mtk"}, ["s3.2", "s2.0", "s2.2", "s3.0"], ["t3.1", "t2.0", "t2.1", "t3.0"]),
    ],
)
def test_only_what_a_term_compares_is_tapped(
    settings: dict[str, object], student: list[str], teacher: list[str]
) -> None:
    loss = build_loss(load_config(flags=settings).losses, PLAN)
    assert [tap.module for tap in loss.where("student")["taps"]] == student
    assert [tap.module for tap in loss.where("teacher")["taps"]] == teacher
