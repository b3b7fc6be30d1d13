"""Grids of cells at a tap, against means written out as loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from irgdistill.matching.levels import Tap
from irgdistill.matching.pooling import GRID, grid
from irgdistill.matching.taps import Tapped


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("height", "width", "cells"),
    [(8, 5, (8, 5)), (16, 32, (8, 8)), (14, 7, (7, 7)), (13, 20, (7, 7)), (1, 9, (1, 5)), (56, 28, (8, 7))],
)
def test_a_grid_holds_the_means_of_cells_that_do_not_overlap(height: int, width: int, cells: tuple[int, int]) -> None:
    assert GRID == 8
    x, sides = random(2, 3, height, width), (-(-height // 8), -(-width // 8))
    found = grid(x, Tap("x", 3, height, width, "NCHW"))
    assert found.shape == (2, 3, *cells) and found.data_ptr() != x.data_ptr()
    for i in range(cells[0]):
        for j in range(cells[1]):
            cell = x[:, :, i * sides[0] : (i + 1) * sides[0], j * sides[1] : (j + 1) * sides[1]]
            torch.testing.assert_close(found[:, :, i, j], cell.mean((2, 3)))


@pytest.mark.parametrize(
    ("tap", "shape"),
    [
        (Tap("x", 5, 12, 9, "NCHW"), (2, 5, 12, 9)),
        (Tap("x", 5, 12, 9, "NHWC"), (2, 12, 9, 5)),
        (Tap("x", 5, 12, 9, "BLC", prefix=2), (2, 110, 5)),
        (Tap("x", 5, 4, 3, "BLC"), (2, 12, 5)),
    ],
)
def test_the_gradient_of_a_grid_is_its_derivative(tap: Tap, shape: tuple[int, ...]) -> None:
    """Assumes the signature of `aten.avg_pool2d_backward`, and that it reads only the shape of its second tensor."""
    for memory in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,):
        x = random(*shape).contiguous(memory_format=memory).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: grid(x, tap), (x,))


def test_half_precision_is_averaged_in_float32() -> None:
    x = random(2, 3, 16, 24).bfloat16().requires_grad_()
    found = grid(x, Tap("x", 3, 16, 24, "NCHW"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float().unflatten(3, (8, 3)).unflatten(2, (8, 2)).mean((3, 5)))
    found.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 6))


def test_tapped_networks_return_grids_before_they_are_changed_in_place() -> None:
    block, last = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)
    network = Tapped(nn.Sequential(block, last), None, grids=[Tap("0", 4, 16, 16, "NCHW")])
    images = torch.randn(2, 3, 16, 16)
    output = network(images)
    assert list(output.grids) == ["0"] and output.features == output.maps == output.energies == {}
    torch.testing.assert_close(output.grids["0"], nn.functional.avg_pool2d(block(images), 2))
    output.grids["0"].sum().backward()
    assert block.weight.grad is not None and (block.weight.grad != 0).all()
