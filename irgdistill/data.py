"""Transforms and loaders from configuration, over the images of `sources`.

Every image is addressed by (epoch, index): its augmentation is seeded by these and the run's seed, so a run does not
depend on the number of workers and can go on in the middle of an epoch. Loaders yield raw images, uint8
(B, 3, H, W), and labels (B,); each network normalises and resizes for itself (`taps.View`).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

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
from irgdistill.held import CropFlip, Held, fits, pixels_of
from irgdistill.signals import leave_to_parent
from irgdistill.sources import Source, Splits


def crop_of(config: AugmentConfig, size: tuple[int, int]) -> str:
    """What `auto` means at this size."""
    return config.crop if config.crop != "auto" else "pad" if max(size) <= 64 else "resized"


def padding_of(config: AugmentConfig, size: tuple[int, int]) -> int:
    """Pixels on each side before the random crop."""
    if crop_of(config, size) != "pad":
        return 0
    return config.padding if config.padding is not None else max(size) // 8


def train_transform(config: AugmentConfig, size: tuple[int, int], interpolation: str, mean: Sequence[float]) -> Any:
    """Augmentation of one image: PIL -> uint8 (3, H, W)."""
    crop = crop_of(config, size)
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
        fit = _fit(size, interpolation)
        steps[:1] = [fit] if crop == "none" else [fit, transforms.RandomCrop(size, padding_of(config, size))]
    if config.erase > 0:
        fill = tuple(round(255 * value) for value in mean)
        steps.append(transforms.RandomErasing(config.erase, value=fill))
    return transforms.Compose(steps)


def _fit(size: tuple[int, int], interpolation: str) -> Any:
    return transforms.Resize(size, transforms.InterpolationMode(interpolation))


def batched(config: AugmentConfig, size: tuple[int, int], seed: int) -> CropFlip | None:
    """The same augmentation of whole batches of images that have this size; None where it does more than crop and
    mirror."""
    if crop_of(config, size) == "resized" or config.color_jitter or config.auto_augment or config.erase:
        return None
    return CropFlip(size, padding_of(config, size), config.hflip, lambda key: seed_words(seed, key))


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
    After `hold`, decoded images are kept in memory, and augmented a batch at a time.
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
        self.held: Held | None = None
        self.answers: Callable[[Sequence[int]], dict[str, Tensor]] | None = None
        self.whole: Callable[[Tensor, Sequence[int]], Tensor] = lambda pixels, keys: pixels

    def hold(self, size: tuple[int, int], fit: Any, whole: Callable[[Tensor, Sequence[int]], Tensor] | None) -> None:
        """Keep every image as `fit` gives it, PIL -> `size`; `whole` then takes the place of `transform`."""
        self.held = Held(len(self), size, lambda position: self._read(position, fit))
        self.whole = whole or self.whole

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int) -> tuple[Tensor, int] | None:
        for position in self._candidates(key):
            found = self._read(position, lambda image: _under(self.seed, key, self.transform, image))
            if found is not None:
                return found
        return None

    def __getitems__(self, keys: Sequence[int]) -> tuple[Any, ...] | None:
        """A batch at once: images (B, 3, H, W) and labels (B,), the unreadable ones left out; None: all are."""
        if self.held is None:
            samples = [(key, sample) for key in keys if (sample := self[key]) is not None]
            batch, kept = _collate([sample for _, sample in samples]), [key for key, _ in samples]
        else:
            held = self.held
            places = [(key, next(filter(held.has, self._candidates(key)), None)) for key in keys]
            kept = [key for key, position in places if position is not None]
            chosen = torch.tensor([position for _, position in places if position is not None], dtype=torch.long)
            batch = (self.whole(held.pixels[chosen], kept), held.labels[chosen]) if kept else None
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


def seed_words(seed: int, key: int) -> Any:
    """Two words for the generators of one image."""
    return np.random.SeedSequence((seed, key)).generate_state(2)


def _under(seed: int, key: int, transform: Any, image: Image.Image) -> Tensor:
    with _seeded(seed, key):
        return cast(Tensor, transform(image))


class _seeded:
    """Python's, numpy's and torch's generators seeded by (seed, key); put back after, where they are the run's own."""

    def __init__(self, seed: int, key: int) -> None:
        self.words = seed_words(seed, key)
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

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        world: World,
        labels: Tensor | None = None,
        views: int | None = None,
    ) -> None:
        self.length = length
        self.views = views
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
        if self.views is not None:
            order %= self.views * self.length
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
        views: int | None = None,
        balance: Tensor | None = None,
    ) -> None:
        world = world or World()
        self.batch_size = batch_size
        self.device = device
        self.bad = bad
        self.stream = isinstance(images, IterableDataset)
        own_order = training and not self.stream
        self.order = Order(len(images), batch_size, seed, world, balance, views) if own_order else None
        forks = workers > 0 and getattr(images, "held", None) is not None and "fork" in mp.get_all_start_methods()
        self.loader = DataLoader(
            images,
            batch_size=batch_size // world.size if training else batch_size,
            sampler=self.order,
            num_workers=workers,
            collate_fn=_collate if self.stream else _as_it_is,
            multiprocessing_context="fork" if forks else None,  # what is held is filled by all
            worker_init_fn=leave_to_parent,
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
                yield tuple(_to(part, self.device) for part in batch)

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
        workers, cores = self.loader.num_workers, len(os.sched_getaffinity(0)) if LINUX else os.cpu_count() or 1
        advice = "smaller files or a faster disk may help"
        if workers < cores - 1:
            advice = "more --workers may help"
        return f"training waited for images {share:.0%} of the time: {advice} (--workers {workers}, {cores} cores)"


WAITING, ENOUGH = 0.1, 10.0
LINUX = hasattr(os, "sched_getaffinity")


def _to(part: Any, device: torch.device) -> Any:
    if isinstance(part, dict):
        return {name: _to(value, device) for name, value in part.items()}
    return part.to(device, non_blocking=True)


def _as_it_is(batch: Any) -> Any:
    return batch


def _collate(samples: list[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor] | None:
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        return None
    return torch.stack([torch.as_tensor(image) for image, _ in kept]), torch.tensor([int(label) for _, label in kept])


def train_images(
    splits: Splits,
    config: DataConfig,
    augment: AugmentConfig,
    size: tuple[int, int],
    interpolation: str,
    mean: Sequence[float],
    seed: int,
    bad: BadImages,
) -> Images:
    """Augmented training images, by key; small ones are held in memory."""
    images = Images(
        splits.train, splits.train_indices, train_transform(augment, size, interpolation, mean), seed, bad, True
    )
    whole = batched(augment, size, seed)
    if whole is not None and fits(len(images), size, config.hold_gib):
        images.hold(size, _then_pixels(_fit(size, interpolation)), whole)
    return images


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
    answers: Callable[[Sequence[int]], dict[str, Tensor]] | None = None,
) -> Loader:
    """Shuffled, augmented batches, this process's part of each. Raises UserError for a batch larger than the data.

    `answers` gives what is known of the views with some keys; the batches then have it as a third part.
    """
    if splits.streaming:
        splits.train.transform = train_transform(augment, size, interpolation, mean)  # type: ignore[attr-defined]
        return Loader(splits.train, config.batch_size, config.workers, device, seed, True, bad)
    count = len(splits.train_indices)
    if config.batch_size > count:
        raise UserError(f"--batch-size {config.batch_size} is larger than the {count} training images")
    view_seed = seed if config.view_seed is None else config.view_seed
    images = train_images(splits, config, augment, size, interpolation, mean, view_seed, bad)
    images.answers = answers
    balance = torch.tensor(splits.train_labels()) if config.balanced else None
    return Loader(images, config.batch_size, config.workers, device, seed, True, bad, world, config.views, balance)


def _then_pixels(fit: Any) -> Any:
    return lambda image: pixels_of(fit(image))


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
    if fits(len(indices), size, config.hold_gib):
        images.hold(size, lambda image: torch.as_tensor(transform(image)), None)
    return Loader(images, config.eval_batch_size, config.workers, device, 0, False, bad)
