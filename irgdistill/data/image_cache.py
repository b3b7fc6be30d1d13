"""Cache of small decoded images in shared memory. Batches are bit for bit those that are read from files.

torchvision and timm cache nothing. `Tensor.share_memory_` needs /dev/shm, which containers often limit to 64 MB.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable
from multiprocessing import reduction
from typing import IO, Any

import torch
from torch import Tensor

LARGEST = 64
"""Pixels. The network takes longer than decoding for larger images."""


UNKNOWN, LOADED, UNREADABLE = range(3)


class ImageCache:
    """Images (N, 3, H, W) uint8 and labels (N,), each read on first use.

    They lie in a file without a name, in memory, which loader processes map and fill together: forked ones inherit it,
    new ones are sent its descriptor.
    """

    def __init__(self, count: int, size: tuple[int, int], read: Callable[[int], tuple[Tensor, int] | None]) -> None:
        self.shape = (count, 3, *size)
        self._read = read
        self._map(_open_memory())

    def _map(self, file: IO[bytes]) -> None:
        count, pixels = self.shape[0], math.prod(self.shape)
        file.truncate(9 * count + pixels)
        memory = mmap.mmap(file.fileno(), 9 * count + pixels)
        self._file = file
        self.labels = torch.frombuffer(memory, dtype=torch.int64, count=count)
        self.states = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=8 * count)
        self.pixels = torch.frombuffer(memory, dtype=torch.uint8, count=pixels, offset=9 * count).view(self.shape)

    def __getstate__(self) -> Any:
        return self.shape, self._read, reduction.DupFd(self._file.fileno())

    def __setstate__(self, state: Any) -> None:
        self.shape, self._read, descriptor = state
        self._map(os.fdopen(descriptor.detach(), "r+b", buffering=0))

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
    return small and (workers == 0 or os.name == "posix")


def _open_memory() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("irgdistill-images"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
