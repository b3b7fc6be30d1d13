"""Small images held decoded in memory, and the plain augmentation of a whole batch of them.

Nothing here changes a number: a batch is what decoding and augmenting its images one by one gives, bit for bit.
"""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

LARGEST = 64
"""Pixels; larger images take more time in the network than in their decoder."""


FORKS = "fork" in multiprocessing.get_all_start_methods()
"""Processes that are started in another way share no memory with this one."""


UNKNOWN, THERE, UNREADABLE = range(3)


class ImageMemory:
    """Images (N, 3, H, W) uint8 and labels (N,), each read once, when it is first asked for.

    In anonymous shared memory, which the loader's processes (forked) fill together.
    """

    def __init__(self, count: int, size: tuple[int, int], read: Callable[[int], tuple[Tensor, int] | None]) -> None:
        shape = (count, 3, *size)
        self.pixels = _shared(int(np.prod(shape)), torch.uint8).view(shape)
        self.labels = _shared(count, torch.int64)
        self.known = _shared(count, torch.uint8)
        self._read = read

    def has(self, position: int) -> bool:
        """Whether this image can be read; reads it if nobody has."""
        state = int(self.known[position])
        if state == UNKNOWN:
            found = self._read(position)
            state = UNREADABLE if found is None else THERE
            if found is not None:
                self.pixels[position], self.labels[position] = found
            self.known[position] = state  # last: whoever sees it may read the rest
        return state == THERE


def fits(count: int, size: tuple[int, int], gib: float, workers: int = 0) -> bool:
    """Whether `count` images of this size are small, together no more than `gib` GiB, and seen by all `workers`."""
    small = max(size) <= LARGEST and count * 3 * size[0] * size[1] <= gib * 2**30
    return small and (workers == 0 or FORKS)


def _shared(count: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, max(count * dtype.itemsize, 1)), dtype=dtype, count=count)
