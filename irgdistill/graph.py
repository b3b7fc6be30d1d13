"""The mathematics of instance relationship graphs: edges and transformations. Pure tensor functions, torch only.

Shapes: B images, D features.

    features             (B, D)   pooled features of one layer, or logits
    edge_matrix          (B, B)   A[i, j] = |f_i - f_j|² / max, symmetric, zero diagonal, in [0, 1]
    transformation_vector(B,)     v[i] = |last_i - first_i|² / max, in [0, 1]

On many processes each holds b of the B images: it computes its own rows of the edge matrix, (b, B), and its own part of
the transformation vector, (b,), and `maximum` turns the largest value it sees into the largest of all.

Source: Liu et al., "Knowledge Distillation via Instance Relationship Graph", CVPR 2019, sections 3.2 and 3.3, and
the authors' Caffe layers: the maximum is a constant in the backward pass. Theirs divide by zero where all features
are equal; here such a graph is all zeros, and a loss against it is zero with zero gradient: nothing is to be learnt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Maximum = Callable[[Tensor], Tensor]
"""Largest value here -> largest value of all processes, elementwise, without gradient."""


def _alone(values: Tensor) -> Tensor:
    return values


def edge_matrix(features: Tensor, rows: slice = slice(None), maximum: Maximum = _alone) -> Tensor:
    """Normalised squared distances between all images of a batch.

    `features` is (B, D) of any floating type; the result is (B, B), or the asked `rows` of it, float32 (float64 stays
    float64), also inside autocast. Distances do not change when a constant is subtracted from every row, so the first
    row and then the mean are removed: features with a large common offset keep their digits in the matrix product, and
    equal features become exact zeros. B = 1 and all-equal features give zeros with zero gradient. Raises ValueError
    where `features` is no matrix.
    """
    x = _matrix(features, "features")
    with torch.autocast(x.device.type, enabled=False):
        x = widen(x)
        x = x - x[:1].detach()
        x = x - x.mean(0).detach()
        norms = x.square().sum(1)
        distances = (norms[rows, None] + norms[None, :] - 2 * (x[rows] @ x.T)).clamp(min=0)
        image = torch.arange(len(x), device=x.device)
        distances = distances.masked_fill(image[rows, None] == image[None, :], 0)
        return _by(maximum(distances.detach().amax()), distances)


def transformation_vector(first: Tensor, last: Tensor, maximum: Maximum = _alone, least: float = 0.0) -> Tensor:
    """How far each image moves between two layers of one network, relative to the image that moves farthest.

    `first` and `last` are (B, D) with equal D; the result is (B,), float32 (float64 stays float64), also inside
    autocast. Where no image moves farther than the share `least` of the longest feature vector, nothing has moved: the
    result is zeros. Ours: the relation divides by the movement, so one that is nearly nothing (residual branches that
    begin near zero, in the extreme mere rounding) has nearly infinite gradients. Raises ValueError when the shapes
    differ.
    """
    first, last = _matrix(first, "first"), _matrix(last, "last")
    if first.shape != last.shape:
        raise ValueError(f"first {tuple(first.shape)} and last {tuple(last.shape)} must have the same shape (B, D)")
    with torch.autocast(first.device.type, enabled=False):
        last = widen(last)
        distances = (last - widen(first)).square().sum(1)
        farthest = torch.stack([distances.detach().amax(), last.detach().square().sum(1).amax()])
        moved, size = maximum(farthest).unbind()
        return _by(moved.masked_fill(moved <= least**2 * size, 0), distances)


def relation_loss(student: Tensor, teacher: Tensor, maximum: Maximum = _alone) -> Tensor:
    """Mean squared difference of two normalised relations of equal shape: edge matrices or transformation vectors.

    Zero, with zero gradient, when either relation is degenerate (all zeros): a maximum of 1 marks every other one.
    The authors' Euclidean loss is B/2 times this for both kinds, and their edge gradient half of that loss's.
    """
    largest = maximum(torch.stack([student.detach().amax(), teacher.detach().amax().to(student.dtype)]))
    informative = (largest.amin() > 0).to(student.dtype)
    return informative * (student - teacher.to(student.dtype)).square().mean()


def _matrix(x: Tensor, name: str) -> Tensor:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point matrix (B, D), got {tuple(x.shape)} of {x.dtype}")
    return x


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Vectors along the last dimension, divided by their length; a zero vector stays zero, with zero gradient."""
    squared = x.square().sum(-1, keepdim=True)
    return torch.where(squared > 0, x * torch.where(squared > 0, squared, 1).rsqrt(), 0)


def _by(largest: Tensor, distances: Tensor) -> Tensor:
    """`distances` over the largest of them; zeros where that is 0."""
    none = largest == 0
    return (distances / torch.where(none, torch.ones_like(largest), largest)).masked_fill(none, 0)
