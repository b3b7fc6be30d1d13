"""The statistics against double loops and other people's code; the graphs against the loss."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from irgdistill.commands.inspect.measures import (
    LOGITS,
    Graph,
    collect_features,
    compare_graphs,
    draw_evenly,
    graph_of,
    similarity,
    stages_of,
)
from irgdistill.config.schema import LossesConfig
from irgdistill.errors import UserError
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss
from irgdistill.losses.terms.maps import attended
from irgdistill.matching.plan import match
from irgdistill.matching.taps import Tapped
from irgdistill.models.build import build_network
from irgdistill.training import similarity as similarities
from irgdistill.training.similarity import (
    agreement,
    each_pair,
    linear_cka,
    nearest_neighbours,
    pearson,
    ranks,
    spearman,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class OneBatch:
    """A loader of two batches."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def epoch(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.images, self.labels)]


def test_the_loss_and_the_inspection_find_the_same_numbers() -> None:
    """One batch through `DistillLoss` and through the inspection, teacher and student of different input sizes."""
    torch.manual_seed(0)
    teacher = build_network("cifar_resnet20", num_classes=3)
    student = build_network("cifar_resnet14_x0_5", num_classes=3, input_size=(16, 16))
    plan = match(teacher.levels(), student.levels())
    grids = [tap for tap, _ in attended(plan)], [tap for _, tap in attended(plan)]
    networks = [
        Tapped(teacher.model, teacher.preprocess(), plan.teacher_taps(), grids=grids[0]).eval(),
        Tapped(student.model, student.preprocess(), plan.student_taps(), grids=grids[1]).eval(),
    ]
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(12) % 3
    config = LossesConfig.model_validate(
        {"edges": {"weight": 1}, "transform": {"weight": 1}, "positions": {"weight": 1}}
    )
    with torch.no_grad():
        taught, learnt = (network(images) for network in networks)
        raw = build_loss(config, plan)(Batch(learnt, labels, taught))
    features = collect_features(networks, OneBatch(images, labels))  # type: ignore[arg-type]
    numbers = []
    for compared in compare_graphs(stages_of(plan, logits=True), ["a", "b"], features, neighbours=3):
        assert list(compared.graphs) == ["a", "b"]
        numbers.append(compared.similarities["b"])
    assert len(numbers) == len(plan.pairs) + 1
    assert numbers[-2]["edges"]["mse"] == pytest.approx(float(raw["edges"]), rel=1e-5) and float(raw["edges"]) > 0
    moved = [number["transformation"]["mse"] for number in numbers[:-1]]
    assert sum(moved) / len(moved) == pytest.approx(float(raw["transform"]), rel=1e-6)
    positions = [number["positions"] for number in numbers[:-1]]
    assert numbers[-1]["positions"] is None and 0 < sum(positions) / 3 < 1
    assert 1 - sum(positions) / 3 == pytest.approx(float(raw["positions"]), rel=1e-5)
    assert torch.equal(features.by_network[0][LOGITS], taught.logits) and features.thumbnails[0].shape == (3, 32, 32)


def test_thumbnails_are_small_and_keep_their_shape() -> None:
    network = build_network("cifar_resnet14_x0_5", num_classes=3)
    tapped = Tapped(network.model, network.preprocess()).eval()
    features = collect_features([tapped], OneBatch(torch.zeros(2, 3, 96, 192, dtype=torch.uint8), torch.zeros(2)))  # type: ignore[arg-type]
    assert [tuple(pixels.shape) for pixels in features.thumbnails] == [(3, 32, 64)] * 2


def test_values_that_are_not_finite_are_refused() -> None:
    network = build_network("cifar_resnet14_x0_5", num_classes=3)
    next(network.model.parameters()).data.fill_(torch.nan)
    tapped = Tapped(network.model, network.preprocess()).eval()
    with pytest.raises(UserError, match="not finite at logits"):
        collect_features([tapped], OneBatch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2)))  # type: ignore[arg-type]


# --- statistics -------------------------------------------------------------------------------------------------------


def test_each_pair_counts_once() -> None:
    edges = torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]])
    assert each_pair(edges).tolist() == [1, 2, 3]


def test_ranks_share_the_mean_where_values_are_equal() -> None:
    x = [3.0, 1.0, 3.0, 2.0, 3.0, 1.0]
    by_hand = [sum(y < v for y in x) + (sum(y == v for y in x) + 1) / 2 for v in x]
    assert ranks(torch.tensor(x)).tolist() == by_hand == [5, 1.5, 5, 3, 5, 1.5]


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    a = random(200, seed=seed).mul(3).round()  # many ties
    b = (a + random(200, seed=seed + 100)).round()
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
    assert pearson(a, -a) == pytest.approx(-1, abs=1e-12) and spearman(a, a.exp()) == pytest.approx(1)


def test_correlation_of_something_constant_is_not_defined() -> None:
    constant, other = torch.full((9,), 0.1), torch.arange(9.0)
    for measure in (pearson, spearman):
        assert measure(constant, other) is None and measure(other, constant) is None
    assert pearson(torch.ones(0), torch.ones(0)) is None


def test_neighbours_by_a_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    features = random(20, 4).round()  # equal distances occur
    edges = graph_of({"x": features}, "x", None).edges
    found = nearest_neighbours(edges, 4)
    for i in range(20):
        others = sorted((float(edges[i, j]), j) for j in range(20) if j != i)
        assert found[i].tolist() == [j for _, j in others[:4]]
    monkeypatch.setattr(similarities, "BLOCK", 60)
    assert torch.equal(nearest_neighbours(edges, 4), found)  # in blocks of three rows
    assert agreement(found, found) == 1
    assert agreement(torch.tensor([[1, 2], [0, 2]]), torch.tensor([[2, 3], [3, 4]])) == 0.25


@pytest.mark.parametrize("widths", [(5, 3), (5, 12), (7, 3)])
def test_cka_is_the_ratio_of_hsics(widths: tuple[int, int]) -> None:
    """tr(KHLH) by loops, with the kernels of Kornblith et al. 2019, equation 3; fewer features than images or more."""
    x, y = random(7, widths[0]) + 100, random(7, widths[1], seed=1)
    count = len(x)

    def hsic(a: Tensor, b: Tensor) -> float:
        kernels = [[[float(v[i] @ v[j]) for j in range(count)] for i in range(count)] for v in (a, b)]
        centred = []
        for kernel in kernels:
            rows = [sum(row) / count for row in kernel]
            mean = sum(rows) / count
            centred.append([[kernel[i][j] - rows[i] - rows[j] + mean for j in range(count)] for i in range(count)])
        return sum(centred[0][i][j] * centred[1][j][i] for i in range(count) for j in range(count))

    assert linear_cka(x, y) == pytest.approx(hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5, rel=1e-8)
    assert linear_cka(x, 3 * x + 1) == pytest.approx(1)
    assert linear_cka(torch.ones(7, 2), y) is None and linear_cka(torch.ones(7, 9), y) is None


def test_a_degenerate_graph_has_no_correlation() -> None:
    flat = graph_of({"x": torch.ones(6, 3)}, "x", ("x", "x"))
    other = graph_of({"x": random(6, 3).float(), "y": random(6, 3, seed=1).float()}, "x", ("x", "y"))
    numbers = similarity(flat, other, 2)
    assert numbers["edges"] == {"mse": 0.0, "pearson": None, "spearman": None, "neighbours": None, "cka": None}
    assert numbers["transformation"] == {"mse": 0.0, "pearson": None, "spearman": None}
    assert similarity(other, replace(other, moved=None), 2)["transformation"] is None
    same = similarity(other, other, 2)["edges"]
    one = pytest.approx(1, abs=1e-12)
    assert same == {"mse": 0.0, "pearson": one, "spearman": one, "neighbours": 1.0, "cka": pytest.approx(1)}
    assert isinstance(other, Graph)


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_images_are_drawn_evenly_and_sorted_by_class() -> None:
    labels = [i % 4 for i in range(80)]
    chosen = draw_evenly(labels, 30, seed=0)
    drawn = [labels[i] for i in chosen]
    assert drawn == sorted(drawn) and sorted(Counter(drawn).values()) == [7, 7, 8, 8] and len(set(chosen)) == 30
    assert chosen == draw_evenly(labels, 30, seed=0) != draw_evenly(labels, 30, seed=1)
    assert set(draw_evenly(labels, 10, seed=0)) < set(chosen)


def test_a_class_that_has_run_out_leaves_its_share_to_the_others() -> None:
    labels = [0] * 2 + [1] * 50 + [3] * 50  # no image of class 2
    assert Counter(labels[i] for i in draw_evenly(labels, 30, seed=0)) == {0: 2, 1: 14, 3: 14}
    assert draw_evenly(labels, 500, seed=0) == list(range(102))


def test_more_classes_than_images() -> None:
    labels = [i // 3 for i in range(3000)]
    drawn = [labels[i] for i in draw_evenly(labels, 64, seed=0)]
    assert len(set(drawn)) == 64 and max(drawn) > 900


def test_stages_of_one_resolution_have_names_of_their_own() -> None:
    names = ("vit_tiny_patch16_224", "vit_small_patch16_224")
    levels = [build_network(name, meta=True).levels() for name in names]
    stages = stages_of(match(*levels), logits=True)
    assert [stage.name for stage in stages] == ["/16 part 1", "/16 part 2", "/16 part 3", "/16 part 4", "logits"]
    assert len({stage.teacher for stage in stages}) == 5
