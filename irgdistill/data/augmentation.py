"""Training and evaluation transforms: of one image, or of a whole batch if it is only cropped and flipped.

The augmentation of an image depends only on the run's seed and the image's key.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision import transforms

from irgdistill.config import AugmentConfig, InputSpec
from irgdistill.errors import UserError


class CropFlip:
    """Zero-padded random crop, then random horizontal flip, of each image in a batch.

    Bit for bit what torchvision's RandomCrop and RandomHorizontalFlip do to each image under its own seed. Those draw
    one crop for a whole batch, in transforms.v2 too; called for each image they take three times as long.
    """

    def __init__(self, size: tuple[int, int], padding: int, hflip: float, seed: int) -> None:
        self.size, self.padding, self.hflip, self.seed = size, padding, hflip, seed

    def __call__(self, pixels: Tensor, keys: Sequence[int]) -> Tensor:
        """(B, 3, H, W) uint8 and the B keys -> (B, 3, H, W) uint8."""
        height, width = self.size
        padded = F.pad(pixels, [self.padding] * 4).numpy() if self.padding else pixels.numpy()
        result = np.empty(pixels.shape, dtype=np.uint8)
        generator = torch.Generator()
        for number, key in enumerate(keys):
            top, left, flip = self._draw(key, generator)
            crop = padded[number, :, top : top + height, left : left + width]
            result[number] = crop[:, :, ::-1] if flip else crop
        return torch.from_numpy(result)

    def _draw(self, key: int, generator: torch.Generator) -> tuple[int, int, bool]:
        generator.manual_seed(int(image_seeds(self.seed, key)[0]))
        top = left = 0
        if self.padding:
            top, left = (int(torch.randint(0, 2 * self.padding + 1, (1,), generator=generator)) for _ in range(2))
        return top, left, self.hflip > 0 and bool(torch.rand(1, generator=generator) < self.hflip)


def to_tensor(image: Any) -> Tensor:
    """RGB image of PIL -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop_of(config: AugmentConfig, size: tuple[int, int]) -> str:
    """The crop of `augment.crop`; `auto` depends on the size."""
    return config.crop if config.crop != "auto" else "pad" if max(size) <= 64 else "resized"


def padding_of(config: AugmentConfig, size: tuple[int, int]) -> int:
    """Pixels that are added to each side before the random crop."""
    if crop_of(config, size) != "pad":
        return 0
    return config.padding if config.padding is not None else max(size) // 8


def train_transform(config: AugmentConfig, input_spec: InputSpec, setting: str = "augment.auto_augment") -> Any:
    """Augmentation of one image: PIL -> uint8 (3, H, W). An unknown policy raises UserError with `setting`."""
    size = input_spec.size
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
            interpolation=input_spec.interpolation,
            mean=input_spec.mean,
        )
    except (AssertionError, ValueError, KeyError) as error:
        if config.auto_augment is None:
            raise
        raise UserError(
            f"{setting} = {config.auto_augment!r} is not a timm policy "
            f"(rand-m9-mstd0.5, augmix-m5-w4, original-mstd0.5, …) {error}".rstrip()
        ) from None
    steps = compose.transforms
    _posterize_to_black(steps)
    if crop in ("pad", "none"):
        resize = resize_to(input_spec)
        steps[:1] = [resize] if crop == "none" else [resize, transforms.RandomCrop(size, padding_of(config, size))]
    if config.erase > 0:
        fill = tuple(round(255 * value) for value in input_spec.mean)
        steps.append(transforms.RandomErasing(config.erase, value=fill))
    return transforms.Compose(steps)


def _posterize_to_black(steps: Sequence[Any]) -> None:
    """Let timm's posterize return a black image where it keeps no bits, as Pillow did before it refused that."""
    for step in steps:
        for entry in (*getattr(step, "ops", ()), *getattr(step, "policy", ())):
            for op in entry if isinstance(entry, list) else [entry]:
                if op.name.startswith("Posterize"):
                    op.aug_fn = partial(_posterize, op.aug_fn)


def _posterize(keep: Any, image: Image.Image, bits: int, **options: Any) -> Image.Image:
    return Image.new(image.mode, image.size) if bits < 1 else keep(image, bits, **options)


def resize_to(input_spec: InputSpec) -> Any:
    """Resize to the input size, whatever the aspect ratio: PIL -> PIL."""
    return transforms.Resize(input_spec.size, transforms.InterpolationMode(input_spec.interpolation))


def batch_transform(config: AugmentConfig, size: tuple[int, int], seed: int) -> CropFlip | None:
    """`train_transform` for a batch of images of this size; None if it does more than crop and flip."""
    if crop_of(config, size) == "resized" or config.color_jitter or config.auto_augment or config.erase:
        return None
    return CropFlip(size, padding_of(config, size), config.hflip, seed)


def eval_transform(input_spec: InputSpec) -> Any:
    """Resize and centre crop of one image: PIL -> uint8 (3, H, W)."""
    return create_transform(
        input_spec.size,
        use_prefetcher=True,
        interpolation=input_spec.interpolation,
        crop_pct=input_spec.crop_pct,
    )


def image_seeds(seed: int, key: int, second: bool = False) -> Any:
    """Two seeds for the generators of one image, or of its second view."""
    return np.random.SeedSequence((seed, key, 1) if second else (seed, key)).generate_state(2)


def transform_seeded(seed: int, key: int, transform: Any, image: Image.Image, second: bool = False) -> Tensor:
    """Apply `transform` under generators seeded by (seed, key, second)."""
    with _seeded(seed, key, second):
        return cast(Tensor, transform(image))


class _seeded:
    """Seed Python's, numpy's and torch's generators by (seed, key, second); the main process restores them then."""

    def __init__(self, seed: int, key: int, second: bool) -> None:
        self.seeds = image_seeds(seed, key, second)
        self.saved: Any = None

    def __enter__(self) -> None:
        if get_worker_info() is None:
            self.saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(int(self.seeds[0]))
        np.random.seed(int(self.seeds[1]))
        torch.default_generator.manual_seed(int(self.seeds[0]))  # torch.manual_seed would visit every device

    def __exit__(self, *_: object) -> None:
        if self.saved:
            random.setstate(self.saved[0])
            np.random.set_state(self.saved[1])
            torch.set_rng_state(self.saved[2])
