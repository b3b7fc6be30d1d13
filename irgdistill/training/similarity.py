"""Measures how similar two graphs of the same N images are. D, E: widths of features."""

from __future__ import annotations

import torch
from torch import Tensor

from irgdistill.graph import centred

BLOCK = 2**22
"""Entries of the block of rows in which neighbours are searched at once."""


def each_pair(edges: Tensor) -> Tensor:
    """The values above the diagonal of (N, N), row by row: (N·(N-1)/2,)."""
    return edges[torch.ones_like(edges, dtype=torch.bool).triu(1)]


def pearson(a: Tensor, b: Tensor) -> float | None:
    """Correlation of two vectors in float64; None if either is constant."""
    a, b = a.double(), b.double()
    if not len(a) or bool(a.amin() == a.amax()) or bool(b.amin() == b.amax()):
        return None
    a, b = a - a.mean(), b - b.mean()
    return float((a / a.norm() @ (b / b.norm())).clamp(-1, 1))


def ranks(x: Tensor) -> Tensor:
    """Ranks from 1 in float64; equal values get the mean of their ranks."""
    _, group, counts = torch.unique(x, return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2)[group]
    return ranks


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Correlation of the ranks, ties averaged; None if either vector is constant."""
    return pearson(ranks(a), ranks(b))


def nearest_neighbours(edges: Tensor, count: int) -> Tensor:
    """(N, N) -> (N, count): the other images with the smallest edges, nearest first.

    Of equally near images, the one with the smaller index comes first.
    """
    others = edges.clone().fill_diagonal_(torch.inf)
    return torch.cat([_smallest(rows, count) for rows in others.split(max(BLOCK // len(edges), 1))])


def _smallest(rows: Tensor, count: int) -> Tensor:
    """Columns of the `count` smallest values of each row, in the order of a stable sort of the whole row."""
    last = rows.kthvalue(count, dim=1, keepdim=True).values
    below, equal = rows < last, rows == last
    chosen = below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))
    columns = chosen.nonzero()[:, 1].view(len(rows), count)
    return columns.gather(1, rows.gather(1, columns).argsort(dim=1, stable=True))


def agreement(a: Tensor, b: Tensor) -> float:
    """Mean share of common entries in the rows of two (N, k) tables of neighbours."""
    return float((a[:, :, None] == b[:, None, :]).any(2).double().mean())


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Centred kernel alignment of features (N, D) and (N, E) with linear kernels (Kornblith et al. 2019, section 3).

    None if all features of either network are equal.
    """
    x, y = (centred(features.double()) for features in (x, y))
    if len(x) > max(x.shape[1], y.shape[1]):  # |XXᵀ| = |XᵀX| and ⟨XXᵀ, YYᵀ⟩ = |XᵀY|²: the smaller matrices
        norms, common = [(x.T @ x).norm(), (y.T @ y).norm()], (x.T @ y).square()
    else:
        norms, common = [(x @ x.T).norm(), (y @ y.T).norm()], (x @ x.T) * (y @ y.T)
    if not all(norm > 0 for norm in norms):
        return None
    return float((common / norms[0] / norms[1]).sum().clamp(0, 1))
