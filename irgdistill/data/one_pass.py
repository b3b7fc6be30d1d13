"""Images in order, each once, with their positions: for results by file name, over any number of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from irgdistill.data.augmentation import eval_transform
from irgdistill.data.dataset import Images, UnreadableImages
from irgdistill.data.loader import Loader
from irgdistill.errors import DataError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from irgdistill.config import DataConfig, InputSpec
    from irgdistill.data.splits import Source


class _Numbered:
    """Images of another source, in place of whose labels are their positions in `indices`."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.source.load(self.indices[index])[0], index

    def describe(self, index: int) -> str:
        return str(self.source.describe(self.indices[index]))

    def labels(self) -> list[int]:
        return list(range(len(self)))


class OnePass:
    """Batches of raw images (B, 3, H, W) uint8 and their positions (B,) in `indices`, both on the device.

    Unreadable images are named by `warn`, and left out. Nothing is kept from batch to batch.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        crop: InputSpec,
        device: torch.device,
        warn: Callable[[str], None],
        indices: Sequence[int] | None = None,
        limit: int | None = None,
    ) -> None:
        """`limit`: unreadable images that are allowed; None: any number."""
        self.source, self.warn, self.limit = _Numbered(source, indices or range(len(source))), warn, limit
        self.unreadable = 0
        """Number of images left out so far."""
        notes = UnreadableImages(-1, warn)
        images = Images(self.source, range(len(self.source)), eval_transform(crop), 0, notes, training=False)
        workers = config.workers if len(images) > config.eval_batch_size else 0  # a batch has one reader
        self.loader = Loader(images, config.eval_batch_size, workers, device, notes, training=False)

    def __len__(self) -> int:
        """Number of images, with the unreadable ones."""
        return len(self.source)

    def name(self, position: int) -> str:
        """Name of the image at a position."""
        return self.source.describe(position)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Raises DataError for more than `limit` unreadable images, and if no image can be read."""
        expected = self.unreadable = 0
        for images, positions in self.loader.epoch():
            there = positions.tolist()
            self._report(sorted(set(range(expected, there[-1] + 1)) - set(there)))
            expected = there[-1] + 1
            yield images, positions
        self._report(range(expected, len(self)))
        if self.unreadable == len(self):
            raise DataError(f"none of {len(self):,} images can be read")

    def _report(self, missing: Sequence[int]) -> None:
        for position in missing:
            self.unreadable += 1
            if self.limit is not None and self.unreadable > self.limit:
                raise DataError(
                    f"{self.unreadable} unreadable images, {self.limit} allowed (--max-bad-images): "
                    f"{self.name(position)}"
                )
            self.warn(f"unreadable image left out: {self.name(position)}")
