"""Loaders of training and validation images.

A key (epoch and index) addresses every image, and seeds its augmentation together with the run's seed. A run therefore
does not depend on the number of workers, and resumes in the middle of an epoch. Loaders yield raw images, uint8
(B, 3, H, W), and labels (B,); each network normalises and resizes them itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import Compose

from irgdistill.config import AugmentConfig, DataConfig, InputSpec
from irgdistill.data.augmentation import batch_transform, eval_transform, resize_to, to_tensor, train_transform
from irgdistill.data.dataset import Images, UnreadableImages, collate
from irgdistill.data.image_cache import fits
from irgdistill.data.sampling import EpochSampler
from irgdistill.data.splits import Splits
from irgdistill.data.waiting import WaitMeter
from irgdistill.errors import UserError
from irgdistill.runtime import World, ignore_signals, loader_context, start_server


class Loader:
    """Batches on the device: raw images (B, 3, H, W) uint8 and labels (B,).

    `sampler` draws training images, B of which are this process's part of `batch_size`. Without one, all images come
    once, in order; those of a stream in the order of its own.
    """

    def __init__(
        self,
        images: Any,
        batch_size: int,
        workers: int,
        device: torch.device,
        unreadable: UnreadableImages,
        training: bool,
        sampler: EpochSampler | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.device = device
        self.unreadable = unreadable
        self.training = training
        self.images = len(images)
        self.stream = isinstance(images, IterableDataset)
        self.sampler = sampler
        self.waiting = WaitMeter(workers)
        self._epoch = 0
        if workers and device.type == "cuda":
            start_server()
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # `bottleneck` advises instead
        self.loader = DataLoader(
            images,
            batch_size=batch_size if sampler is None else len(sampler.part),
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate if self.stream else no_collate,
            worker_init_fn=ignore_signals,
            drop_last=training,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0 and not self.stream,  # a stream learns its epoch when workers start
            generator=torch.Generator(),  # its own, so that opening an epoch draws nothing from the run's
        )

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return self.images // self.batch_size if self.training else -(-self.images // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Any, ...]]:
        """Batches of one epoch, from batch `start` on: images, labels and, with a cache, the teacher's outputs.

        Raises UserError if too many images are unreadable.
        """
        skip, self._epoch = 0, epoch
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.start = epoch, start
        elif self.stream:
            self.loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
            self.loader.generator.manual_seed(epoch)
            skip = start
        if self.loader.num_workers:  # persistent ones that run already stay as they are
            self.loader.multiprocessing_context = loader_context()
        for number, batch in enumerate(self.waiting.measured(self.loader)):
            self.unreadable.collect()
            if batch is not None and number >= skip:
                if self.stream:
                    self.loader.dataset.check(batch[1])  # type: ignore[attr-defined]
                yield tuple(part.to(self.device, non_blocking=True) for part in batch)

    def bottleneck(self, seconds: float, busy: float) -> str | None:
        """`WaitMeter.advice`. The epoch that fills the image cache does not count."""
        filling = self._epoch == 0 and getattr(self.loader.dataset, "cache", None) is not None
        return self.waiting.advice(seconds, busy, ignore=filling)


def no_collate(batch: Any) -> Any:
    """`Images` returns whole batches."""
    return batch


def train_images(
    splits: Splits,
    config: DataConfig,
    augment: AugmentConfig,
    crop: InputSpec,
    seed: int,
    unreadable: UnreadableImages,
) -> Images:
    """Augmented training images, by key; small ones are cached."""
    images = Images(splits.train, splits.train_indices, train_transform(augment, crop), seed, unreadable, True)
    if config.second_view is not None:
        changed = augment.replaced({"auto_augment": config.second_view})
        images.second = train_transform(changed, crop, "data.second_view")
    transform = batch_transform(augment, crop.size, seed)
    if transform is not None and fits(len(images), crop.size, config.image_cache_gib, config.workers):
        images.use_cache(crop.size, Compose([resize_to(crop), to_tensor]), transform)
    return images


def train_loader(
    splits: Splits,
    config: DataConfig,
    augment: AugmentConfig,
    crop: InputSpec,
    device: torch.device,
    seed: int,
    unreadable: UnreadableImages,
    world: World | None = None,
    teacher_rows: Callable[[Sequence[int]], Tensor] | None = None,
) -> Loader:
    """Shuffled, augmented batches, this process's part of each. Raises UserError for a batch larger than the data.

    `teacher_rows` maps keys to cached teacher outputs, which the batches then contain as a third part. With a second
    view, half as many images make up a batch: first all first views, then all second ones, in the same order.
    """
    if splits.streaming and config.second_view is not None:
        raise UserError(f"data.second_view: {config.source} is a stream, whose images have one view each")
    if splits.streaming:
        splits.train.transform = train_transform(augment, crop)  # type: ignore[attr-defined]
        return Loader(splits.train, config.batch_size, config.workers, device, unreadable, True)
    count, own = len(splits.train_indices), config.batch_size // (1 if config.second_view is None else 2)
    if config.second_view is not None and config.batch_size % (2 * (world or World()).size):
        raise UserError(
            f"data.second_view halves a batch: --batch-size {config.batch_size} must be even in each process"
        )
    if own > count:
        raise UserError(f"--batch-size {config.batch_size} is larger than the {count} training images")
    view_seed = seed if config.view_seed is None else config.view_seed
    images = train_images(splits, config, augment, crop, view_seed, unreadable)
    images.teacher_rows = teacher_rows
    labels = torch.tensor(splits.train_labels()) if config.balanced else None
    sampler = EpochSampler(count, own, seed, world or World(), labels, config.views)
    return Loader(images, own, config.workers, device, unreadable, True, sampler)


def eval_loader(
    splits: Splits,
    config: DataConfig,
    crop: InputSpec,
    device: torch.device,
    unreadable: UnreadableImages,
    limit: int | None = None,
    world: World | None = None,
) -> Loader:
    """Validation images in order, each once, resized and cropped to `crop`.

    `limit` takes that many, evenly spaced. With `world`, the processes share the images.
    """
    transform = eval_transform(crop)
    if splits.streaming:
        splits.val.transform = transform  # type: ignore[attr-defined]
        return Loader(splits.val, config.eval_batch_size, config.workers, device, unreadable, False)
    indices = splits.val_indices
    if limit and limit < len(indices):
        indices = [indices[i * len(indices) // limit] for i in range(limit)]
    if world is not None:
        indices = indices[world.rank :: world.size]
    images = Images(splits.val, indices, transform, 0, unreadable, training=False)
    if fits(len(indices), crop.size, config.image_cache_gib, config.workers):
        images.use_cache(crop.size, Compose([transform, torch.as_tensor]), None)
    return Loader(images, config.eval_batch_size, config.workers, device, unreadable, False)
