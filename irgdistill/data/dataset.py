"""Data set of augmented images by key, read one at a time or in batches; counts unreadable images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from irgdistill.data.augmentation import transform_seeded
from irgdistill.data.decoding import DEEP, RESCALED, TURNED
from irgdistill.data.image_cache import ImageCache
from irgdistill.data.splits import Source
from irgdistill.errors import DataError, one_line
from irgdistill.runtime import sharing_context

NOTES = {
    RESCALED: "holds {}: such an image is scaled by its own range to 0 to 255",
    DEEP: "has {} a channel: such an image is scaled by its depth to 0 to 255",
    TURNED: "is turned upright by {}, as every such photo (data.exif_orientation)",
}
"""What the log says of the first image of each kind, by the key of `Image.info` whose value it contains."""


class UnreadableImages:
    """Names of unreadable images. Workers report them through a queue; `collect` warns in the main process.

    A process reports no more than end the run: what it writes must fit into the queue until that is read. `limit` -1:
    none is reported.
    The queue takes (kind, name, text): an empty kind for an unreadable image and the reason, another for a note about a
    readable one, of which the first of each kind is shown.
    """

    def __init__(
        self,
        limit: int,
        warn: Callable[[str], None] = lambda line: None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`warn` takes what is lost, `note` what is read rightly but not as it is stored."""
        self.limit = limit
        self.names: list[str] = []
        self.noted: set[str] = set()
        self.queue: Any = sharing_context().SimpleQueue()
        self._warn, self._note = warn, note

    def collect(self) -> None:
        """Warn about images reported since the last call. Raises DataError if there are more than `limit` in all."""
        while not self.queue.empty():
            kind, name, text = self.queue.get()
            if kind:
                if kind not in self.noted:
                    self.noted.add(kind)
                    (self._warn if kind == RESCALED else self._note)(f"{name} {text}")
                continue
            if name in self.names:
                continue
            self.names.append(name)
            if len(self.names) > self.limit:
                raise DataError(
                    f"{len(self.names)} unreadable images, {self.limit} allowed (--max-bad-images): "
                    + ", ".join(self.names[-3:])
                )
            self._warn(f"unreadable image skipped ({len(self.names)} of {self.limit} allowed): {name} ({text})")


class Images(Dataset[Any]):
    """Transformed images of a source, by key = epoch · len + position; the key alone seeds the transform.

    An unreadable image is reported. In training the next readable one replaces it; in evaluation it is skipped.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        transform: Any,
        seed: int,
        unreadable: UnreadableImages,
        training: bool,
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.queue = unreadable.queue
        self.limit = unreadable.limit
        self.training = training
        self.noted: set[str] = set()
        self.reported = 0
        """Unreadable images that this process has reported."""
        self.cache: ImageCache | None = None
        self.batch_transform: Callable[[Tensor, Sequence[int]], Tensor] | None = None
        self.teacher_rows: Callable[[Sequence[int]], Tensor] | None = None
        """Keys -> cached teacher outputs, which batches then contain as a third part."""
        self.second: Callable[[Image.Image], Tensor] | None = None
        """Transform of a second view of every image; batches then hold all first views and after them all second."""

    def use_cache(
        self,
        size: tuple[int, int],
        decode: Any,
        batch_transform: Callable[[Tensor, Sequence[int]], Tensor] | None,
    ) -> None:
        """Cache what `decode`, PIL -> uint8 (3, *size), returns; `batch_transform` then replaces `transform`."""
        self.cache = ImageCache(len(self), size, partial(self._read, transform=decode))
        self.batch_transform = batch_transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int) -> tuple[Tensor, int] | None:
        for position in self._candidates(key):
            found = self._read(position, lambda image: self._views(key, image))
            if found is not None:
                return found
        return None

    def __getitems__(self, keys: Sequence[int]) -> tuple[Any, ...] | None:
        """Images (B, 3, H, W) and labels (B,) without the unreadable ones; None if there are no others.

        With a second view, (2·B, 3, H, W) and (2·B,).
        """
        kept, batch = self._samples(keys) if self.cache is None else self._cached_samples(self.cache, keys)
        if batch is not None and self.second is not None:
            batch = batch[0].transpose(0, 1).flatten(0, 1), batch[1].repeat(2)
        if batch is None or self.teacher_rows is None:
            return batch
        return (*batch, self.teacher_rows(kept))

    def _views(self, key: int, image: Image.Image) -> Tensor:
        """The augmented image (3, H, W), or with a second view both (2, 3, H, W)."""
        first = transform_seeded(self.seed, key, self.transform, image)
        if self.second is None:
            return first
        second = transform_seeded(self.seed, key, self.second, image, second=True)
        return torch.stack([torch.as_tensor(first), torch.as_tensor(second)])

    def _samples(self, keys: Sequence[int]) -> tuple[list[int], tuple[Tensor, Tensor] | None]:
        """Keys of the readable images, and their batch; each image is transformed alone."""
        samples = [(key, sample) for key in keys if (sample := self[key]) is not None]
        return [key for key, _ in samples], collate([sample for _, sample in samples])

    def _cached_samples(self, cache: ImageCache, keys: Sequence[int]) -> tuple[list[int], tuple[Tensor, Tensor] | None]:
        """The same from the cache; the batch is transformed at once."""
        found = [(key, next(filter(cache.load, self._candidates(key)), None)) for key in keys]
        kept = [key for key, position in found if position is not None]
        if not kept:
            return kept, None
        chosen = torch.tensor([position for _, position in found if position is not None])
        pixels, labels = cache.pixels[chosen], cache.labels[chosen]
        first = pixels if self.batch_transform is None else self.batch_transform(pixels, kept)
        if self.second is None:
            return kept, (first, labels)
        images = (Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()) for x in pixels)
        second = [
            torch.as_tensor(transform_seeded(self.seed, key, self.second, image, second=True))
            for key, image in zip(kept, images, strict=True)
        ]
        return kept, (torch.stack([first, torch.stack(second)], dim=1), labels)

    def _candidates(self, key: int) -> Iterator[int]:
        """Positions to try."""
        for attempt in range(min(self.limit + 1, len(self)) if self.training else 1):
            yield (key + attempt) % len(self)

    def _read(self, position: int, transform: Any) -> tuple[Tensor, int] | None:
        try:
            image, label = self.source.load(self.indices[position])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if self.reported <= self.limit:
                self.reported += 1
                self.queue.put(("", self.source.describe(self.indices[position]), one_line(error, 100)))
            return None
        for kind in (NOTES.keys() & image.info.keys()) - self.noted:
            self.noted.add(kind)
            name = self.source.describe(self.indices[position])
            self.queue.put((kind, name, NOTES[kind].format(image.info[kind])))
        return transform(image), label


def collate(samples: list[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor] | None:
    """Images (B, 3, H, W) and labels (B,) of the samples that are not None; None if there are none."""
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        return None
    return torch.stack([torch.as_tensor(image) for image, _ in kept]), torch.tensor([int(label) for _, label in kept])
