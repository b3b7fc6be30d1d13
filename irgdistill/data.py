"""Transforms and loaders from configuration, over the images of `sources`.

Every image is addressed by (epoch, index): its augmentation is seeded by these and the run's seed, so a run does not
depend on the number of workers and can go on in the middle of an epoch. Loaders yield raw images, uint8
(B, 3, H, W), and labels (B,); each network normalises and resizes for itself (`taps.View`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision import transforms

from irgdistill.balance import draw_balanced
from irgdistill.config import AugmentConfig, DataConfig
from irgdistill.distributed import World
from irgdistill.errors import UserError
from irgdistill.signals import leave_to_parent
from irgdistill.sources import Source, Splits


def train_transform(config: AugmentConfig, size: tuple[int, int], interpolation: str, mean: Sequence[float]) -> Any:
    """Augmentation of one image: PIL -> uint8 (3, H, W)."""
    crop = config.crop if config.crop != "auto" else "pad" if max(size) <= 64 else "resized"
    compose = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,  # uint8, not normalised
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        color_jitter=config.color_jitter or None,
        auto_augment=config.auto_augment,
        interpolation=interpolation,
        mean=mean,
    )
    steps = compose.transforms
    if crop in ("pad", "none"):
        padding = config.padding if config.padding is not None else max(size) // 8
        fit = transforms.Resize(size, transforms.InterpolationMode(interpolation))
        steps[:1] = [fit] if crop == "none" else [fit, transforms.RandomCrop(size, padding)]
    if config.erase > 0:
        fill = tuple(round(255 * value) for value in mean)
        steps.append(transforms.RandomErasing(config.erase, value=fill))
    return transforms.Compose(steps)


def eval_transform(size: tuple[int, int], interpolation: str, crop_pct: float) -> Any:
    """Deterministic view of one image: PIL -> uint8 (3, H, W)."""
    return create_transform(size, use_prefetcher=True, interpolation=interpolation, crop_pct=crop_pct)


class BadImages:
    """Unreadable images, named once each; workers report through a queue, `collect` warns in the main process."""

    def __init__(self, limit: int, warn: Callable[[str], None] = lambda line: None) -> None:
        self.limit = limit
        self.names: list[str] = []
        self.queue: Any = mp.SimpleQueue()
        self._warn = warn

    def collect(self) -> None:
        """Name what is new since the last call. Raises UserError once there are more than `limit`."""
        while not self.queue.empty():
            name = self.queue.get()
            if name in self.names:
                continue
            self.names.append(name)
            if len(self.names) > self.limit:
                raise UserError(
                    f"{len(self.names)} unreadable images, {self.limit} allowed (--max-bad-images): "
                    + ", ".join(self.names[-3:])
                )
            self._warn(f"unreadable image skipped ({len(self.names)} of {self.limit} allowed): {name}")


class Images(Dataset[Any]):
    """Images of a source by key = epoch · len + position, transformed under a seed that depends on the key alone.

    An unreadable image is reported and, in training, replaced by the next readable one; in evaluation left out.
    """

    def __init__(
        self, source: Source, indices: Sequence[int], transform: Any, seed: int, bad: BadImages, training: bool
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.queue = bad.queue
        self.limit = bad.limit
        self.training = training

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int) -> tuple[Tensor, int] | None:
        for attempt in range(min(self.limit + 1, len(self)) if self.training else 1):
            index = self.indices[(key + attempt) % len(self)]
            try:
                image, label = self.source.load(index)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                self.queue.put(self.source.describe(index))
                continue
            with _seeded(self.seed, key):
                return self.transform(image), label
        return None


class _seeded:
    """Python's, numpy's and torch's generators seeded by (seed, key); put back after, where they are the run's own."""

    def __init__(self, seed: int, key: int) -> None:
        self.words = np.random.SeedSequence((seed, key)).generate_state(2)
        self.saved: Any = None

    def __enter__(self) -> None:
        if get_worker_info() is None:
            self.saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(int(self.words[0]))
        np.random.seed(int(self.words[1]))
        torch.default_generator.manual_seed(int(self.words[0]))  # torch.manual_seed would visit every device

    def __exit__(self, *_: object) -> None:
        if self.saved:
            random.setstate(self.saved[0])
            np.random.set_state(self.saved[1])
            torch.set_rng_state(self.saved[2])


class Order(torch.utils.data.Sampler[int]):
    """Keys of one epoch's whole batches, shuffled by (seed, epoch), from a batch on: this process's part of each.

    With `labels` (length,) every class is drawn equally often.

    The batches of all processes together are those of one process. Each takes as many from the front of a batch as
    from its back, in mirror order, so that mixup, which pairs the first image with the last, finds its partners.
    """

    def __init__(self, length: int, batch_size: int, seed: int, world: World, labels: Tensor | None = None) -> None:
        self.length = length
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        share = batch_size // world.size
        front, back = share // 2, share - share // 2
        self.part = [
            *range(world.rank * front, (world.rank + 1) * front),
            *range(batch_size - (world.rank + 1) * back, batch_size - world.rank * back),
        ]
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        )
        count = self.length // self.batch_size * self.batch_size
        if self.labels is None:
            order = torch.randperm(self.length, generator=generator) + self.epoch * self.length
        else:
            order = draw_balanced(self.labels, count, self.epoch, generator)
        whole = order[:count].view(-1, self.batch_size)
        return iter(whole[self.start :, self.part].flatten().tolist())

    def __len__(self) -> int:
        return (self.length // self.batch_size - self.start) * len(self.part)


class Loader:
    """Batches of one split on the device: raw images (B, 3, H, W) uint8 and labels (B,).

    In training, B is this process's part of `batch_size`.
    """

    def __init__(
        self,
        images: Any,
        batch_size: int,
        workers: int,
        device: torch.device,
        seed: int,
        training: bool,
        bad: BadImages,
        world: World | None = None,
        balance: Tensor | None = None,
    ) -> None:
        world = world or World()
        self.batch_size = batch_size
        self.device = device
        self.bad = bad
        self.stream = isinstance(images, IterableDataset)
        self.order = Order(len(images), batch_size, seed, world, balance) if training and not self.stream else None
        self.loader = DataLoader(
            images,
            batch_size=batch_size // world.size if training else batch_size,
            sampler=self.order,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=leave_to_parent,
            drop_last=training,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0 and not self.stream,  # a stream learns its epoch when workers start
            generator=torch.Generator(),  # its own, so that opening an epoch draws nothing from the run's
        )
        self.training = training
        self.images = len(images)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.images // self.batch_size if self.training else -(-self.images // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch, from batch `start` on. Raises UserError when too many images are unreadable."""
        skip = 0
        if self.order is not None:
            self.order.epoch, self.order.start = epoch, start
        elif self.stream:
            self.loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
            self.loader.generator.manual_seed(epoch)
            skip = start
        for number, batch in enumerate(self.loader):
            self.bad.collect()
            if batch is not None and number >= skip:
                images, labels = batch
                if self.stream:
                    self.loader.dataset.check(labels)  # type: ignore[attr-defined]
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def _collate(samples: list[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor] | None:
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        return None
    return torch.stack([torch.as_tensor(image) for image, _ in kept]), torch.tensor([int(label) for _, label in kept])


def train_loader(
    splits: Splits,
    config: DataConfig,
    augment: AugmentConfig,
    size: tuple[int, int],
    interpolation: str,
    mean: Sequence[float],
    device: torch.device,
    seed: int,
    bad: BadImages,
    world: World | None = None,
) -> Loader:
    """Shuffled, augmented batches, this process's part of each. Raises UserError for a batch larger than the data."""
    transform = train_transform(augment, size, interpolation, mean)
    if splits.streaming:
        splits.train.transform = transform  # type: ignore[attr-defined]
        return Loader(splits.train, config.batch_size, config.workers, device, seed, True, bad)
    count = len(splits.train_indices)
    if config.batch_size > count:
        raise UserError(f"--batch-size {config.batch_size} is larger than the {count} training images")
    images = Images(splits.train, splits.train_indices, transform, seed, bad, training=True)
    balance = torch.tensor(splits.train_labels()) if config.balanced else None
    return Loader(images, config.batch_size, config.workers, device, seed, True, bad, world, balance)


def eval_loader(
    splits: Splits,
    config: DataConfig,
    size: tuple[int, int],
    interpolation: str,
    crop_pct: float,
    device: torch.device,
    bad: BadImages,
    limit: int | None = None,
    world: World | None = None,
) -> Loader:
    """Validation images in order, every one once; `limit` takes an even selection of them. Processes share them."""
    transform = eval_transform(size, interpolation, crop_pct)
    if splits.streaming:
        splits.val.transform = transform  # type: ignore[attr-defined]
        return Loader(splits.val, config.eval_batch_size, config.workers, device, 0, False, bad)
    indices = splits.val_indices
    if limit and limit < len(indices):
        indices = [indices[i * len(indices) // limit] for i in range(limit)]
    if world is not None:
        indices = indices[world.rank :: world.size]
    images = Images(splits.val, indices, transform, 0, bad, training=False)
    return Loader(images, config.eval_batch_size, config.workers, device, 0, False, bad)
