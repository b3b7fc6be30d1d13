"""Small images held decoded in memory, and the plain augmentation of a whole batch of them.

Nothing here changes a number: a batch is what decoding and augmenting its images one by one gives, bit for bit.
"""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 64
"""Pixels; larger images take more time in the network than in their decoder."""
FORKS = "fork" in multiprocessing.get_all_start_methods()
"""Processes that are started in another way share no memory with this one."""
UNKNOWN, THERE, UNREADABLE = range(3)


class Held:
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


class CropFlip:
    """Zero-padded random crop, then mirror image: torchvision's RandomCrop and RandomHorizontalFlip of a batch.

    Each image has a generator of its own, seeded by `seed_of(key)`, from which it draws what those two draw.
    """

    def __init__(
        self, size: tuple[int, int], padding: int, hflip: float, seed_of: Callable[[int], Sequence[int]]
    ) -> None:
        self.size, self.padding, self.hflip, self.seed_of = size, padding, hflip, seed_of
        self.generator = torch.Generator()

    def __call__(self, pixels: Tensor, keys: Sequence[int]) -> Tensor:
        """(B, 3, H, W) uint8 and the B keys -> (B, 3, H, W) uint8."""
        height, width = self.size
        padded = F.pad(pixels, [self.padding] * 4).numpy() if self.padding else pixels.numpy()
        result = np.empty(pixels.shape, dtype=np.uint8)
        for number, key in enumerate(keys):
            top, left, flip = self._draw(key)
            crop = padded[number, :, top : top + height, left : left + width]
            result[number] = crop[:, :, ::-1] if flip else crop
        return torch.from_numpy(result)

    def _draw(self, key: int) -> tuple[int, int, bool]:
        generator = self.generator.manual_seed(int(self.seed_of(key)[0]))
        top = left = 0
        if self.padding:
            top, left = (int(torch.randint(0, 2 * self.padding + 1, (1,), generator=generator)) for _ in range(2))
        return top, left, self.hflip > 0 and bool(torch.rand(1, generator=generator) < self.hflip)


def pixels_of(image: Any) -> Tensor:
    """PIL image, (H, W, 3) -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
