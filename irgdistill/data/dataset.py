"""Images of a source by key, read and augmented one by one or a batch at a time; and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from irgdistill.data.augmentation import transform_seeded
from irgdistill.data.memory import ImageMemory
from irgdistill.data.splits import Source
from irgdistill.errors import DataError


class UnreadableImages:
    """Unreadable images, named once each; workers report through a queue, `collect` warns in the main process."""

    def __init__(self, limit: int, warn: Callable[[str], None] = lambda line: None) -> None:
        self.limit = limit
        self.names: list[str] = []
        self.queue: Any = mp.SimpleQueue()
        self._warn = warn

    def collect(self) -> None:
        """Name what is new since the last call. Raises DataError once there are more than `limit`."""
        while not self.queue.empty():
            name = self.queue.get()
            if name in self.names:
                continue
            self.names.append(name)
            if len(self.names) > self.limit:
                raise DataError(
                    f"{len(self.names)} unreadable images, {self.limit} allowed (--max-bad-images): "
                    + ", ".join(self.names[-3:])
                )
            self._warn(f"unreadable image skipped ({len(self.names)} of {self.limit} allowed): {name}")


class Images(Dataset[Any]):
    """Images of a source by key = epoch · len + position, transformed under a seed that depends on the key alone.

    An unreadable image is reported and, in training, replaced by the next readable one; in evaluation left out.
    After `hold`, decoded images are kept in memory, and augmented a batch at a time.
    """

    def __init__(
        self, source: Source, indices: Sequence[int], transform: Any, seed: int, bad: UnreadableImages, training: bool
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.queue = bad.queue
        self.limit = bad.limit
        self.training = training
        self.held: ImageMemory | None = None
        self.answers: Callable[[Sequence[int]], Tensor] | None = None
        self.whole: Callable[[Tensor, Sequence[int]], Tensor] | None = None

    def hold(self, size: tuple[int, int], fit: Any, whole: Callable[[Tensor, Sequence[int]], Tensor] | None) -> None:
        """Keep every image as `fit` gives it, PIL -> `size`; `whole` then takes the place of `transform`."""
        self.held = ImageMemory(len(self), size, lambda position: self._read(position, fit))
        self.whole = whole

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int) -> tuple[Tensor, int] | None:
        for position in self._candidates(key):
            found = self._read(position, lambda image: transform_seeded(self.seed, key, self.transform, image))
            if found is not None:
                return found
        return None

    def __getitems__(self, keys: Sequence[int]) -> tuple[Any, ...] | None:
        """A batch at once: images (B, 3, H, W) and labels (B,), the unreadable ones left out; None: all are."""
        if self.held is None:
            samples = [(key, sample) for key in keys if (sample := self[key]) is not None]
            batch, kept = collate([sample for _, sample in samples]), [key for key, _ in samples]
        else:
            held = self.held
            places = [(key, next(filter(held.has, self._candidates(key)), None)) for key in keys]
            kept = [key for key, position in places if position is not None]
            chosen = torch.tensor([position for _, position in places if position is not None], dtype=torch.long)
            pixels, labels = held.pixels[chosen], held.labels[chosen]
            batch = (pixels if self.whole is None else self.whole(pixels, kept), labels) if kept else None
        return batch if batch is None or self.answers is None else (*batch, self.answers(kept))

    def _candidates(self, key: int) -> Iterator[int]:
        """Positions to try."""
        for attempt in range(min(self.limit + 1, len(self)) if self.training else 1):
            yield (key + attempt) % len(self)

    def _read(self, position: int, transform: Any) -> tuple[Tensor, int] | None:
        try:
            image, label = self.source.load(self.indices[position])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            self.queue.put(self.source.describe(self.indices[position]))
            return None
        return transform(image), label


def collate(samples: list[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor] | None:
    """Images (B, 3, H, W) and labels (B,) of what could be read; None: nothing."""
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        return None
    return torch.stack([torch.as_tensor(image) for image, _ in kept]), torch.tensor([int(label) for _, label in kept])
