"""Graph mathematics against a double loop, the authors' numbers, and the degenerate cases they leave out."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from support import SHARED, shared
from torch import Tensor

from irgdistill import graph
from irgdistill.graph import edge_loss, edge_matrix, relation_loss, transformation_loss, transformation_vector

GOLDEN = SHARED / "golden/irg_reference.json"
REFERENCE = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"edges": [], "transformations": []}


def tensor(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Golden values; "nan" marks where the authors divide by zero and this project gives zeros."""
    plain = [[0.0 if x == "nan" else x for x in (row if isinstance(row, list) else [row])] for row in values]
    return torch.tensor(plain if isinstance(values[0], list) else [row[0] for row in plain], dtype=dtype)


def close(value: Tensor, golden: Tensor, exact: Tensor, kind: str, tolerance: float) -> None:
    """To the tolerance of the authors' numbers.

    Features near 100 lose 4e-6 when they are rounded to float32, before anything is computed. So in float32 the
    offset cases meet the tolerance against float64 on the same rounded features, and the authors' numbers within that
    rounding.
    """
    rounded = kind == "offset" and value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, atol=tolerance, rtol=0)
    torch.testing.assert_close(value.double(), golden, atol=1e-5 if rounded else tolerance, rtol=0)


def ids(cases: list[dict[str, Any]]) -> list[str]:
    return [case["id"] for case in cases]


def test_the_reference_is_there() -> None:
    shared("golden/irg_reference.json")
    assert len(REFERENCE["edges"]) == 37 and len(REFERENCE["transformations"]) == 24


@pytest.mark.parametrize("case", REFERENCE["edges"], ids=ids(REFERENCE["edges"]))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_edges_are_the_authors(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    for role in ("teacher", "student"):
        features = tensor(case["input"][role], dtype)
        edges = edge_matrix(features)
        assert edges.dtype == dtype
        close(edges, tensor(case["expected"][f"edge_{role}"]), edge_matrix(features.double()), case["kind"], tolerance)


@pytest.mark.parametrize("case", REFERENCE["edges"], ids=ids(REFERENCE["edges"]))
def test_edge_loss_and_gradient_after_conversion(case: dict[str, Any]) -> None:
    """Theirs is Σ(a-b)²/(2B) = B/2 · mean, and their gradient half of that loss's."""
    student = tensor(case["input"]["student"]).requires_grad_()
    loss = case["B"] / 2 * relation_loss(edge_matrix(student), edge_matrix(tensor(case["input"]["teacher"])))
    loss.backward()
    expected = case["expected"]
    assert loss.item() == pytest.approx(0.0 if expected["loss"] == "nan" else expected["loss"], rel=1e-11, abs=1e-14)
    gradient = torch.zeros_like(student) if expected["loss"] == "nan" else tensor(expected["grad_student"])
    scale = gradient.abs().max().clamp(min=1.0).item()
    assert student.grad is not None
    torch.testing.assert_close(student.grad / 2, gradient, atol=1e-10 * scale, rtol=1e-9)


@pytest.mark.parametrize("case", REFERENCE["transformations"], ids=ids(REFERENCE["transformations"]))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_transformations_are_the_authors(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    for role in ("teacher", "student"):
        shallow, deep = (tensor(case["input"][f"{role}_{place}"], dtype) for place in ("shallow", "deep"))
        exact = transformation_vector(shallow.double(), deep.double())
        expected = tensor(case["expected"][f"vec_{role}"])
        close(transformation_vector(shallow, deep), expected, exact, case["kind"], tolerance)


@pytest.mark.parametrize("case", REFERENCE["transformations"], ids=ids(REFERENCE["transformations"]))
def test_transformation_loss_and_gradient_after_conversion(case: dict[str, Any]) -> None:
    """Theirs is Σ(a-b)²/2 = B/2 · mean; the gradient is autograd's."""
    given = {name: tensor(values) for name, values in case["input"].items()}
    deep = given["student_deep"].requires_grad_()
    student = transformation_vector(given["student_shallow"], deep)
    teacher = transformation_vector(given["teacher_shallow"], given["teacher_deep"])
    loss = case["B"] / 2 * relation_loss(student, teacher)
    loss.backward()
    expected = case["expected"]
    assert loss.item() == pytest.approx(0.0 if expected["loss"] == "nan" else expected["loss"], rel=1e-11, abs=1e-14)
    gradient = torch.zeros_like(deep) if expected["loss"] == "nan" else tensor(expected["grad_student_deep"])
    assert deep.grad is not None
    torch.testing.assert_close(deep.grad, gradient, atol=1e-10, rtol=1e-9)


def test_edges_against_a_double_loop() -> None:
    x = torch.randn(9, 5, dtype=torch.float64)
    distances = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in x.tolist()] for p in x.tolist()]
    largest = max(map(max, distances))
    expected = torch.tensor([[d / largest for d in row] for row in distances], dtype=torch.float64)
    edges = edge_matrix(x)
    torch.testing.assert_close(edges, expected, atol=1e-13, rtol=0)
    assert torch.equal(edges.diagonal(), torch.zeros(9, dtype=torch.float64))
    torch.testing.assert_close(edges, edges.T, atol=1e-15, rtol=0)
    assert edges.max() == 1


def test_the_maximum_is_a_constant_in_backward() -> None:
    """Gradient equals autograd of D / c with c the value of the maximum."""
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 6, dtype=torch.float64)
    (ours,) = torch.autograd.grad((edge_matrix(x) * weight).sum(), x)
    distances = (x[:, None] - x[None]).square().sum(2)
    (plain,) = torch.autograd.grad((distances / distances.max().item() * weight).sum(), x)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_a_common_offset_costs_no_digits(offset: float) -> None:
    """Float32 features with mean 100 and deviation 1: the plain matrix product is off by 8e-3."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 32, generator=generator) + offset).float()
    exact = edge_matrix(x.double())
    assert (edge_matrix(x).double() - exact).abs().max() < 2e-6


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-30, 12345.678])
@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (7, 13), (64, 64)])
def test_equal_features_give_zeros_and_no_gradient(value: float, shape: tuple[int, int]) -> None:
    x = torch.full(shape, value, requires_grad=True)
    edges = edge_matrix(x)
    assert torch.equal(edges, torch.zeros(shape[0], shape[0]))
    loss = relation_loss(edges, edge_matrix(torch.randn(shape)))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None and torch.equal(x.grad, torch.zeros(shape))
    moved = transformation_vector(x, x.detach())
    assert torch.equal(moved, torch.zeros(shape[0]))


def test_an_uninformative_teacher_teaches_nothing() -> None:
    student = torch.randn(5, 3, requires_grad=True)
    loss = relation_loss(edge_matrix(student), edge_matrix(torch.ones(5, 8)))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and not student.grad.any()


def test_a_batch_of_two_is_known_beforehand() -> None:
    torch.testing.assert_close(edge_matrix(torch.randn(2, 7)), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_widened_inside_autocast(dtype: torch.dtype) -> None:
    x = (torch.randn(16, 24) * 50).to(dtype)
    first = torch.randn(16, 24).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        edges, moved = edge_matrix(x), transformation_vector(first, x)
    assert edges.dtype == moved.dtype == torch.float32
    assert torch.equal(edges, edge_matrix(x.float()))
    assert torch.equal(moved, transformation_vector(first.float(), x.float()))


def test_scale_does_not_matter() -> None:
    x = torch.randn(8, 8, dtype=torch.float64)
    torch.testing.assert_close(edge_matrix(x * 1e-8), edge_matrix(x * 1e6), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)])
def test_wrong_shapes_are_named(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(B, D\)"):
        edge_matrix(bad)
    with pytest.raises(ValueError, match="same shape"):
        transformation_vector(torch.zeros(2, 3), torch.zeros(2, 4))


def test_non_finite_features_are_not_hidden() -> None:
    x = torch.randn(4, 4)
    x[1, 2] = math.inf
    assert not relation_loss(edge_matrix(x), edge_matrix(torch.randn(4, 4))).isfinite()


def test_images_that_have_not_moved_give_zeros_and_no_gradient() -> None:
    first = torch.randn(6, 8)
    last = (first + 1e-4 * torch.randn(6, 8)).requires_grad_()
    assert transformation_vector(first, last).amax() == 1
    moved = transformation_vector(first, last, least=0.01)
    assert moved.count_nonzero() == 0
    loss = relation_loss(moved, transformation_vector(torch.randn(6, 4), torch.randn(6, 4)))
    loss.backward()
    assert loss == 0 and last.grad is not None and last.grad.count_nonzero() == 0
    far = torch.randn(6, 8)
    assert torch.equal(transformation_vector(first, far, least=0.01), transformation_vector(first, far))


def test_transformation_loss_is_the_mean_over_stages_under_one_maximum() -> None:
    student = [(torch.randn(9, width), torch.randn(9, width).requires_grad_()) for width in (3, 8, 5)]
    teacher = [(torch.randn(9, width), torch.randn(9, width)) for width in (6, 7, 10)]
    student[1] = student[1][0], (student[1][0] + 1e-5).requires_grad_()  # has not moved
    asked: list[Tensor] = []

    def maximum(values: Tensor) -> Tensor:  # another process has an image that moves farther
        asked.append(values)
        return 2 * values

    lasts = [last for _, last in student]
    loss = transformation_loss(student, teacher, maximum, least=0.01)
    assert [len(values.flatten()) for values in asked] == [12]
    expected = torch.stack(
        [
            (transformation_vector(*s, least=0.01) - transformation_vector(*t, least=0.01)).square().mean() / 4
            for s, t in (zip(student, teacher, strict=True))
        ]
    )
    expected = (expected * torch.tensor([1, 0, 1])).mean()
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, lasts)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, lasts))
    assert not gradients[1].any() and gradients[0].any()
    with pytest.raises(ValueError, match="same shape"):
        transformation_loss([(torch.zeros(2, 3), torch.zeros(2, 4))], teacher[:1])


def whole_edge_loss(student: Tensor, teacher: Tensor, rows: slice = slice(None)) -> Tensor:
    """The definition: both matrices, then their mean squared difference; the maximum is that of all rows."""
    largest = [edge_distances(features).amax().detach() for features in (student, teacher)]
    a, b = (edge_distances(f)[rows] / m for f, m in zip((student, teacher), largest, strict=True))
    return (a - b).square().mean()


def edge_distances(x: Tensor) -> Tensor:
    return (x[:, None] - x[None]).square().sum(2)


@pytest.mark.parametrize("block", [1, 70, 200, 2**20])
@pytest.mark.parametrize("rows", [slice(None), slice(4, 11), slice(29, 30)])
def test_edge_loss_in_blocks_is_that_of_whole_matrices(
    block: int, rows: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(graph.BLOCK, "cpu", block)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(30, 5, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = 3 + 7 * torch.randn(30, 8, dtype=torch.float64, generator=generator)

    def maximum(_: Tensor) -> Tensor:  # of all processes
        return torch.stack([edge_distances(f).amax().detach() for f in (student, teacher)])

    results = [edge_loss(student, teacher, rows, maximum), whole_edge_loss(student, teacher, rows)]
    gradients = [torch.autograd.grad(3 * result, student)[0] for result in results]
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_edge_loss_of_large_batches_in_single_precision() -> None:
    """More than one block as they are; the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1500, 16, generator=generator).requires_grad_()
    teacher = 100 + torch.randn(1500, 16, generator=generator)
    exact = student.detach().double().requires_grad_()
    loss = edge_loss(student, teacher)
    reference = relation_loss(edge_matrix(exact), edge_matrix(teacher.double()))
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    gradient, expected = torch.autograd.grad(loss, student)[0], torch.autograd.grad(reference, exact)[0]
    assert float((gradient - expected).abs().max() / expected.abs().max()) < 1e-5


def test_edge_loss_of_equal_features_is_zero_and_of_nan_is_nan() -> None:
    moving = torch.randn(6, 3).requires_grad_()
    for student, teacher in ((moving, torch.ones(6, 4)), (torch.ones(6, 3, requires_grad=True), torch.randn(6, 4))):
        loss = edge_loss(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        assert float(loss.detach()) == 0 and not gradient.any()
    assert edge_loss(moving, torch.full((6, 4), torch.nan)).isnan()
    assert edge_loss(torch.full((6, 3), torch.nan, requires_grad=True), torch.randn(6, 4)).isnan()
    with pytest.raises(ValueError, match="student must be"):
        edge_loss(torch.zeros(3), moving)
