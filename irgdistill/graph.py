"""Instance relationship graphs: edges and transformations. Pure tensor functions; imports torch only.

Shapes: B images, D features.

    features             (B, D)   pooled features of one layer, or logits
    edge_matrix          (B, B)   A[i, j] = |f_i - f_j|² / max, symmetric, zero diagonal, in [0, 1]
    transformation_vector(B,)     v[i] = |last_i - first_i|² / max, in [0, 1]

With several processes, each holds b of the B images. The losses `edge_loss` and `transformation_loss` then compare the
process's own rows of the edge matrix, (b, B), and its own part of the transformation vector, (b,); `maximum` turns the
process's largest value into the largest of all processes.

Source: Liu et al., "Knowledge Distillation via Instance Relationship Graph", CVPR 2019, sections 3.2 and 3.3, and
the authors' Caffe layers: the maximum is a constant in the backward pass. Theirs divide by zero if all features are
equal; here such a graph is all zeros, and a loss against it is zero with zero gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Maximum = Callable[[Tensor], Tensor]
"""Largest value of this process -> largest value of all processes, elementwise, without gradient."""


def _identity(values: Tensor) -> Tensor:
    return values


def edge_matrix(features: Tensor) -> Tensor:
    """Normalised squared distances between all images of a batch.

    `features` is (B, D) of any floating type; the result is (B, B), float32 (float64 stays float64), also inside
    autocast. Distances do not change when a constant is subtracted from every row, so the first row and then the mean
    are subtracted: features with a large common offset keep their precision in the matrix product, and equal features
    become exact zeros. B = 1 and all-equal features give zeros with zero gradient. Raises ValueError if `features` is
    not a matrix.
    """
    x = _matrix(features, "features")
    with torch.autocast(x.device.type, enabled=False):
        x = centred(x)
        norms = x.square().sum(1)
        distances = (norms[:, None] + norms - 2 * (x @ x.T)).clamp(min=0)
        distances = distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
        return _normalised(distances.detach().amax(), distances)


def transformation_vector(first: Tensor, last: Tensor, least: float = 0.0) -> Tensor:
    """Squared distance of each image's features between two layers of one network, relative to the largest.

    `first` and `last` are (B, D) with equal D; the result is (B,), float32 (float64 stays float64), also inside
    autocast. The result is zeros if no image moves farther than the share `least` of the longest feature vector. This
    is not in the paper: the relation divides by the movement, so a movement near zero (residual branches initialised
    near zero, in the extreme case rounding) has nearly infinite gradients. Raises ValueError if the shapes differ.
    """
    vectors, _ = _transformations([(first, last)], _identity, least)
    return vectors[0]


def _transformations(stages: Sequence[tuple[Tensor, Tensor]], maximum: Maximum, least: float) -> tuple[Tensor, Tensor]:
    """Transformation vectors (S, B) of the (first, last) of S stages, and whether each stage moved (S,)."""
    with torch.autocast(stages[0][0].device.type, enabled=False):
        pairs = [(widen(_matrix(first, "first")), widen(_matrix(last, "last"))) for first, last in stages]
        for first, last in pairs:
            if first.shape != last.shape:
                shapes = f"first {tuple(first.shape)} and last {tuple(last.shape)}"
                raise ValueError(f"{shapes} must have the same shape (B, D)")
        distances = torch.stack([(last - first).square().sum(1) for first, last in pairs])
        lengths = torch.stack([last.detach().square().sum(1) for _, last in pairs])
        farthest, size = maximum(torch.stack([distances.detach(), lengths]).amax(2))
        farthest = farthest.masked_fill(farthest <= least**2 * size, 0)
        return _normalised(farthest[:, None], distances), farthest > 0


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two normalised relations of equal shape: edge matrices or transformation vectors.

    Zero, with zero gradient, if either relation is degenerate (all zeros); every other one has a maximum of 1. The
    authors' Euclidean loss is B/2 times this for both kinds, and their edge gradient is half of that loss's.
    """
    informative = ((student.detach().amax() > 0) & (teacher.detach().amax() > 0)).to(student.dtype)
    return informative * (student - teacher.to(student.dtype)).square().mean()


def transformation_loss(
    student: Sequence[tuple[Tensor, Tensor]],
    teacher: Sequence[tuple[Tensor, Tensor]],
    maximum: Maximum = _identity,
    least: float = 0.0,
) -> Tensor:
    """Mean over matched stages of the `relation_loss` of their transformation vectors; a stage is its (first, last).

    One call of `maximum` serves both networks and all stages: a stage's largest entry is 1, or it has not moved. Raises
    ValueError as `transformation_vector` does.
    """
    vectors, moved = _transformations([*student, *teacher], maximum, least)
    here, there = vectors.unflatten(0, (2, -1)).unbind()
    informative = moved.unflatten(0, (2, -1)).all(0).to(vectors.dtype)
    total: Tensor = informative * (here - there).square().mean(1)
    return total.mean()


def edge_loss(student: Tensor, teacher: Tensor, rows: slice = slice(None), maximum: Maximum = _identity) -> Tensor:
    """`relation_loss` of the edge matrices of two networks' features, (B, D) and (B, D'); mean over `rows`.

    The edge matrices are never stored: blocks of rows are computed, compared and turned into the gradient one after
    another, so memory grows with B, not with B². Only `student` gets a gradient. Raises ValueError as `edge_matrix`
    does.
    """
    with torch.autocast(student.device.type, enabled=False):
        x, y = centred(_matrix(student, "student")), centred(_matrix(teacher, "teacher")).detach()
        return cast(Tensor, _EdgeLoss.apply(x, y.to(x.dtype), rows, maximum))


BLOCK = {"cpu": 2**20}
"""Entries of a block: small enough for a CPU's cache; on other devices (2²⁶), large enough for a kernel launch."""


class _EdgeLoss(torch.autograd.Function):
    """Computes the loss of `edge_loss` and its gradient in one pass.

    With D[i, j] = |x_i - x_j|² and G = ∂loss/∂D, the gradient is 2 Σ_j G[i, j] (x_i - x_j) for each row, and the
    negative of each summand for its column.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, rows: slice, maximum: Maximum) -> Tensor:
        norms_x, norms_y = x.square().sum(1), y.square().sum(1)
        blocks = list(_blocks(x, rows))

        def both(block: slice) -> tuple[Tensor, Tensor]:
            return _distances(x, norms_x, block), _distances(y, norms_y, block)

        only = [both(blocks[0])] if len(blocks) == 1 else None
        farthest = [torch.stack([there.amax() for there in pair]) for pair in only or map(both, blocks)]
        largest = maximum(torch.stack(farthest).amax(0))
        informative = (largest > 0).all().to(x.dtype)
        largest_x, largest_y = largest.masked_fill(largest == 0, 1)
        entries = len(x) * sum(len(x[block]) for block in blocks)
        total, gradient = x.new_zeros(()), torch.zeros_like(x)
        for block, (here, there) in zip(blocks, only or map(both, blocks), strict=True):
            difference = here.div_(largest_x).sub_(there.div_(largest_y))
            total += torch.linalg.vector_norm(difference, dim=1).square().sum()
            slope = difference.mul_(4 / (entries * largest_x))
            gradient[block] += slope.sum(1, keepdim=True) * x[block] - slope @ x
            gradient += slope.sum(0)[:, None] * x - slope.T @ x[block]
        ctx.save_for_backward(gradient * informative)
        return total / entries * informative

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        return outer * ctx.saved_tensors[0], None, None, None


def _blocks(x: Tensor, rows: slice) -> Iterator[slice]:
    """Split `rows` into parts of about BLOCK entries each."""
    wanted = range(len(x))[rows]
    size = max(BLOCK.get(x.device.type, 2**26) // len(x), 1)
    for start in range(wanted.start, wanted.stop, size):
        yield slice(start, min(start + size, wanted.stop))


def _distances(x: Tensor, norms: Tensor, rows: slice) -> Tensor:
    """Squared distances (b, B) of centred features, as in `edge_matrix`."""
    distances = x[rows] @ x.T
    distances.mul_(-2).add_(norms[rows, None]).add_(norms).clamp_(min=0)
    distances.diagonal(rows.start).zero_()
    return distances


def cosines(features: Tensor, rows: slice = slice(None)) -> Tensor:
    """(…, N, D) -> (…, n, N - 1): cosines of the instances of `rows` with all others, float32 (float64 stays float64).

    The cosine with a zero vector is zero.
    """
    x = unit(widen(features))
    with torch.autocast(x.device.type, enabled=False):
        return off_diagonal(x[..., rows, :] @ x.mT, rows)


def off_diagonal(matrix: Tensor, rows: slice = slice(None)) -> Tensor:
    """(…, n, N), the `rows` of a matrix (…, N, N) -> (…, n, N - 1): each without its entry on the diagonal, which may
    change the order of the others."""
    own = matrix[..., rows]
    size = own.shape[-1]
    between = own.flatten(-2)[..., 1:].reshape(*own.shape[:-2], size - 1, size + 1)[..., :-1]
    others = between.reshape(*own.shape[:-1], size - 1)
    if size == matrix.shape[-1]:
        return others
    return torch.cat([others, matrix[..., : rows.start], matrix[..., rows.stop :]], dim=-1)


FLAT = 1e-3
"""A row whose deviations from its mean are below this share of its values tells nothing: it has no correlation."""


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - Pearson's correlation of each row of (…, N), mean over the rows; it does not depend on a row's scale.

    Rows that are flat (see `FLAT`) in either network count as zero, with zero gradient.
    """
    rows = widen(student), widen(teacher)
    here, there = (x - x.mean(-1, keepdim=True) for x in rows)
    squares = [x.square().sum(-1) for x in (here, there)]
    least = [FLAT**2 * x.detach().square().sum(-1) for x in rows]
    informative = (squares[0].detach() > least[0]) & (squares[1] > least[1])
    here_scale, there_scale = (x.masked_fill(~informative, torch.inf).rsqrt() for x in squares)
    losses: Tensor = informative.to(here.dtype) - (here * there).sum(-1) * here_scale * there_scale
    return losses.mean()


def softmax_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / T) ‖ softmax(student / T)) of each row of (…, N), mean over the rows."""
    log_p, log_q = ((widen(x) / temperature).log_softmax(-1) for x in (teacher, student))
    total = F.kl_div(log_q, log_p.to(log_q.dtype), reduction="sum", log_target=True)
    return total / log_q.shape[:-1].numel()


def centred(x: Tensor) -> Tensor:
    """Subtract the first row and then the mean, in float32 or float64."""
    x = widen(x)
    x = x - x[:1].detach()
    return x - x.mean(0).detach()


def _matrix(x: Tensor, name: str) -> Tensor:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point matrix (B, D), got {tuple(x.shape)} of {x.dtype}")
    return x


def widen(x: Tensor) -> Tensor:
    """Convert to float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Vectors along the last dimension, divided by their length; a zero vector stays zero, with zero gradient."""
    squared = x.square().sum(-1, keepdim=True)
    return x * squared.masked_fill(squared == 0, torch.inf).rsqrt()


def _normalised(largest: Tensor, distances: Tensor) -> Tensor:
    """Divide `distances` by their largest; zeros if that is 0."""
    none = largest == 0
    return (distances / torch.where(none, torch.ones_like(largest), largest)).masked_fill(none, 0)
