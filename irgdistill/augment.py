"""Augmentation from configuration, of one image or, where it is plain, of a whole batch.

What an image becomes is decided by the run's seed and the image's key, and by nothing that was drawn before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision import transforms

from irgdistill.errors import UserError
from irgdistill.held import CropFlip, pixels_of
from irgdistill.settings import AugmentConfig


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
    try:
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
    except (AssertionError, ValueError, KeyError) as error:
        if config.auto_augment is None:
            raise
        raise UserError(
            f"augment.auto_augment = {config.auto_augment!r} is no policy of timm "
            f"(rand-m9-mstd0.5, augmix-m5-w4, original-mstd0.5, …) {error}".rstrip()
        ) from None
    steps = compose.transforms
    if crop in ("pad", "none"):
        fit = fit_to(size, interpolation)
        steps[:1] = [fit] if crop == "none" else [fit, transforms.RandomCrop(size, padding_of(config, size))]
    if config.erase > 0:
        fill = tuple(round(255 * value) for value in mean)
        steps.append(transforms.RandomErasing(config.erase, value=fill))
    return transforms.Compose(steps)


def fit_to(size: tuple[int, int], interpolation: str) -> Any:
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


def then_pixels(fit: Any) -> Any:
    """The same, PIL -> uint8 (3, H, W)."""
    return lambda image: pixels_of(fit(image))


def seed_words(seed: int, key: int) -> Any:
    """Two words for the generators of one image."""
    return np.random.SeedSequence((seed, key)).generate_state(2)


def under(seed: int, key: int, transform: Any, image: Image.Image) -> Tensor:
    """What `transform` makes of an image under the generators of this key."""
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
