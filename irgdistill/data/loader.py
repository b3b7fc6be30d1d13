"""Loaders from configuration, over the images of `sources`.

Every image is addressed by (epoch, index): its augmentation is seeded by these and the run's seed, so a run does not
depend on the number of workers and can go on in the middle of an epoch. Loaders yield raw images, uint8
(B, 3, H, W), and labels (B,); each network normalises and resizes for itself (`taps.View`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from irgdistill.config import AugmentConfig, DataConfig, InputSpec
from irgdistill.data.augmentation import batched, eval_transform, resize_to, to_uint8, train_transform
from irgdistill.data.dataset import Images, UnreadableImages, collate
from irgdistill.data.memory import fits
from irgdistill.data.sampling import EpochSampler
from irgdistill.data.splits import Splits
from irgdistill.errors import UserError
from irgdistill.runtime import World, cores, ignore_signals

WAITING, ENOUGH = 0.1, 10.0
"""Share of the time, and seconds, from which waiting for images is worth a word."""


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
        bad: UnreadableImages,
        world: World | None = None,
        views: int | None = None,
        balance: Tensor | None = None,
    ) -> None:
        world = world or World()
        self.batch_size = batch_size
        self.device = device
        self.bad = bad
        self.stream = isinstance(images, IterableDataset)
        own_order = training and not self.stream
        self.order = EpochSampler(len(images), batch_size, seed, world, balance, views) if own_order else None
        forks = workers > 0 and getattr(images, "held", None) is not None
        self.loader = DataLoader(
            images,
            batch_size=batch_size // world.size if training else batch_size,
            sampler=self.order,
            num_workers=workers,
            collate_fn=collate if self.stream else no_collate,
            multiprocessing_context="fork" if forks else None,  # what is held is filled by all
            worker_init_fn=ignore_signals,
            drop_last=training,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0 and not self.stream,  # a stream learns its epoch when workers start
            generator=torch.Generator(),  # its own, so that opening an epoch draws nothing from the run's
        )
        self.training = training
        self.images = len(images)
        self.waited = 0.0
        """Seconds for which batches were waited for."""
        self._first, self._told, self._epoch = True, False, 0
        self._asked = self._behind = 0.0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.images // self.batch_size if self.training else -(-self.images // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Any, ...]]:
        """Batches of one epoch, from batch `start` on: images, labels, answers where there are.

        Raises UserError when too many images are unreadable.
        """
        skip, self._epoch = 0, epoch
        if self.order is not None:
            self.order.epoch, self.order.start = epoch, start
        elif self.stream:
            self.loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
            self.loader.generator.manual_seed(epoch)
            skip = start
        for number, batch in enumerate(self._timed(self.loader)):
            self.bad.collect()
            if batch is not None and number >= skip:
                if self.stream:
                    self.loader.dataset.check(batch[1])  # type: ignore[attr-defined]
                yield tuple(part.to(self.device, non_blocking=True) for part in batch)

    def _timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(batches)
        while True:
            since = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - since
            yield batch

    def bottleneck(self, seconds: float, behind: float) -> str | None:
        """That training waited for images for more than WAITING of its time, and what to change; told once.

        To be asked every `seconds`; `behind`: those for which the device was still at work when all was asked of it.
        Looked at in stretches of ENOUGH seconds, without the first one asked about, in which processes start, and
        without an epoch that fills the memory.
        """
        filling = self._epoch == 0 and getattr(self.loader.dataset, "held", None) is not None
        if self._first or filling:
            self._first, self.waited = False, 0.0
            return None
        self._asked, self._behind = self._asked + seconds, self._behind + behind
        if self._asked < ENOUGH:
            return None
        share, busy = self.waited / self._asked, self._behind / self._asked
        self.waited = self._asked = self._behind = 0.0
        if self._told or share < WAITING or 2 * busy > WAITING:
            return None
        self._told = True
        workers, count = self.loader.num_workers, cores()
        advice = "smaller files or a faster disk may help"
        if workers < count - 1:
            advice = "more --workers may help"
        return f"training waited for images {share:.0%} of the time: {advice} (--workers {workers}, {count} cores)"


def no_collate(batch: Any) -> Any:
    """What `Images` gives is a batch already."""
    return batch


def train_images(
    splits: Splits,
    config: DataConfig,
    augment: AugmentConfig,
    crop: InputSpec,
    seed: int,
    bad: UnreadableImages,
) -> Images:
    """Augmented training images, by key; small ones are held in memory."""
    images = Images(splits.train, splits.train_indices, train_transform(augment, crop), seed, bad, True)
    whole = batched(augment, crop.size, seed)
    if whole is not None and fits(len(images), crop.size, config.image_cache_gib, config.workers):
        images.hold(crop.size, to_uint8(resize_to(crop)), whole)
    return images


def train_loader(
    splits: Splits,
    config: DataConfig,
    augment: AugmentConfig,
    crop: InputSpec,
    device: torch.device,
    seed: int,
    bad: UnreadableImages,
    world: World | None = None,
    answers: Callable[[Sequence[int]], Tensor] | None = None,
) -> Loader:
    """Shuffled, augmented batches, this process's part of each. Raises UserError for a batch larger than the data.

    `answers` gives what is known of the views with some keys; the batches then have it as a third part.
    """
    if splits.streaming:
        splits.train.transform = train_transform(augment, crop)  # type: ignore[attr-defined]
        return Loader(splits.train, config.batch_size, config.workers, device, seed, True, bad)
    count = len(splits.train_indices)
    if config.batch_size > count:
        raise UserError(f"--batch-size {config.batch_size} is larger than the {count} training images")
    view_seed = seed if config.view_seed is None else config.view_seed
    images = train_images(splits, config, augment, crop, view_seed, bad)
    images.answers = answers
    balance = torch.tensor(splits.train_labels()) if config.balanced else None
    return Loader(images, config.batch_size, config.workers, device, seed, True, bad, world, config.views, balance)


def eval_loader(
    splits: Splits,
    config: DataConfig,
    crop: InputSpec,
    device: torch.device,
    bad: UnreadableImages,
    limit: int | None = None,
    world: World | None = None,
) -> Loader:
    """Validation images in order, every one once, resized and cropped to `crop`.

    `limit` takes an even selection of them. Processes share them.
    """
    transform = eval_transform(crop)
    if splits.streaming:
        splits.val.transform = transform  # type: ignore[attr-defined]
        return Loader(splits.val, config.eval_batch_size, config.workers, device, 0, False, bad)
    indices = splits.val_indices
    if limit and limit < len(indices):
        indices = [indices[i * len(indices) // limit] for i in range(limit)]
    if world is not None:
        indices = indices[world.rank :: world.size]
    images = Images(splits.val, indices, transform, 0, bad, training=False)
    if fits(len(indices), crop.size, config.image_cache_gib, config.workers):
        images.hold(crop.size, lambda image: torch.as_tensor(transform(image)), None)
    return Loader(images, config.eval_batch_size, config.workers, device, 0, False, bad)
