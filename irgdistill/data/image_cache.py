"""Cache of small decoded images in shared memory. Batches are bit for bit those that are read from files.

torchvision and timm cache nothing. `Tensor.share_memory_` needs /dev/shm, which containers often limit to 64 MB.
"""

from __future__ import annotations

import mmap
import multiprocessing
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

LARGEST = 64
"""Pixels. The network takes longer than decoding for larger images."""


FORKS = "fork" in multiprocessing.get_all_start_methods()
"""Workers that are started in another way share no memory with this process."""


def start_method(cached: bool) -> str | None:
    """How loader workers start: by a fork where they share an `ImageCache`, and on Linux, as torch does by itself up to
    Python 3.13. A child touches no GPU, so that it may be forked after CUDA has started."""
    return "fork" if FORKS and (cached or sys.platform == "linux") else None


UNKNOWN, LOADED, UNREADABLE = range(3)


class ImageCache:
    """Images (N, 3, H, W) uint8 and labels (N,), each read on first use.

    They lie in anonymous shared memory, which forked loader workers fill together.
    """

    def __init__(self, count: int, size: tuple[int, int], read: Callable[[int], tuple[Tensor, int] | None]) -> None:
        shape = (count, 3, *size)
        self.pixels = _shared(int(np.prod(shape)), torch.uint8).view(shape)
        self.labels = _shared(count, torch.int64)
        self.states = _shared(count, torch.uint8)
        self._read = read

    def load(self, position: int) -> bool:
        """Read an image, unless it was read before; returns whether it is readable."""
        state = int(self.states[position])
        if state == UNKNOWN:
            found = self._read(position)
            state = UNREADABLE if found is None else LOADED
            if found is not None:
                self.pixels[position], self.labels[position] = found
            self.states[position] = state  # last: other workers may then use the image
        return state == LOADED


def fits(count: int, size: tuple[int, int], gib: float, workers: int = 0) -> bool:
    """Whether `count` images of this size are small, take at most `gib` GiB, and can be shared with the workers."""
    small = max(size) <= LARGEST and count * 3 * size[0] * size[1] <= gib * 2**30
    return small and (workers == 0 or FORKS)


def _shared(count: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, max(count * dtype.itemsize, 1)), dtype=dtype, count=count)
