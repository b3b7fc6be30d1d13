"""Datasets and loaders from configuration, through timm's datasets and transforms.

Every image is addressed by (epoch, index): its augmentation is seeded by these and the run's seed, so a run does not
depend on the number of workers and can go on in the middle of an epoch. Loaders yield raw images, uint8
(B, 3, H, W), and labels (B,); each network normalises and resizes for itself (`taps.View`).
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision import datasets, transforms

from irgdistill.config import AugmentConfig, DataConfig
from irgdistill.errors import UserError, nearest

VAL_FOLDERS = ("val", "validation", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
BUILTIN = ("digits",)
PREFIXES = ("torch/", "hfds/", "hfids/", "wds/", "tfds/")


class Source(Protocol):
    """Indexed images before any transform."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decoded RGB image and its class."""

    def describe(self, index: int) -> str:
        """Name of an image, for messages."""


@dataclass
class Splits:
    """Training and validation images of one data set, with class names in label order."""

    train: Source
    val: Source
    classes: list[str]
    train_indices: Sequence[int]
    val_indices: Sequence[int]
    streaming: bool = False


class TimmSource:
    """A timm or torchvision dataset without a transform."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.reader = getattr(dataset, "reader", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is None:
            image, label = self.dataset[index][:2]
        else:  # timm's own ImageDataset would replace a bad image by its neighbour without a count
            handle, label = self.reader[index][:2]
            image = Image.open(handle)
        return image.convert("RGB"), int(label)

    def describe(self, index: int) -> str:
        try:
            return str(self.reader.filename(index, absolute=True))  # type: ignore[union-attr]
        except (AttributeError, NotImplementedError, AssertionError):
            return f"image {index}"

    def labels(self) -> list[int]:
        """Class of every image, without decoding where the dataset knows them."""
        samples = getattr(self.reader, "samples", None)
        if samples is not None:
            return [int(label) for _, label in samples]
        targets = getattr(self.dataset, "targets", None)
        if targets is not None:
            return [int(label) for label in targets]
        return [self.load(i)[1] for i in range(len(self))]


class DigitsSource:
    """scikit-learn's handwritten digits: 1,797 images of 8×8 grey pixels."""

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("--data digits needs scikit-learn: pip install 'irgdistill[digits]'") from None
        digits = load_digits()
        self.pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
        self.targets = digits.target.astype(int)

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.targets[index])

    def describe(self, index: int) -> str:
        return f"digit {index}"

    def labels(self) -> list[int]:
        return [int(label) for label in self.targets]


def open_splits(config: DataConfig, val_only: bool = False) -> Splits:
    """Find the images of `config.source`. Raises UserError where they are missing, empty or do not fit together."""
    source = config.source
    if not source:
        raise UserError("no data: give --data FOLDER, --data digits or a timm dataset string such as torch/cifar10")
    if source in BUILTIN:
        digits = DigitsSource()
        return _hold_out(digits, digits.labels(), [str(i) for i in range(10)], config.val_fraction or 0.3)
    if source.startswith(PREFIXES):
        return _open_named(source, config)
    return _open_folder(Path(source), config, val_only)


def _open_named(source: str, config: DataConfig) -> Splits:
    split = {"train": config.train_split or "train", "val": config.val_split or "validation"}
    streaming = source.startswith(("wds/", "tfds/", "hfids/"))
    opened = {}
    for role, name in split.items():
        try:
            if source == "torch/cifar100-coarse":
                opened[role] = CoarseCifar100(str(config.root), role == "train", config.download)
                continue
            opened[role] = create_dataset(
                source,
                root=str(config.root),
                split=name,
                is_training=role == "train",
                download=config.download,
                batch_size=config.batch_size,
            )
        except (RuntimeError, OSError, AssertionError, ValueError, ImportError, KeyError) as error:
            hint = "" if config.download else "; --download lets it fetch its files"
            raise UserError(
                f"cannot open the {name} split of {source} in {config.root}: {' '.join(str(error).split())[:200]}{hint}"
            ) from None
    if streaming:
        names = _class_names(opened["train"]) or [str(i) for i in range(config.num_classes or 0)]
        if not names:
            raise UserError(f"{source} does not tell its classes: give --set data.num_classes=N")
        return Splits(opened["train"], opened["val"], names, range(0), range(0), streaming=True)
    train, val = TimmSource(opened["train"]), TimmSource(opened["val"])
    names = _class_names(opened["train"]) or [str(i) for i in range(max(train.labels()) + 1)]
    return Splits(train, val, names, range(len(train)), range(len(val)))


class CoarseCifar100(datasets.CIFAR100):  # type: ignore[misc]
    """CIFAR-100 under its 20 coarse classes (`torch/cifar100-coarse`)."""

    meta: ClassVar[dict[str, str]] = {**datasets.CIFAR100.meta, "key": "coarse_label_names"}

    def __init__(self, root: str, train: bool, download: bool) -> None:
        super().__init__(root, train=train, download=download)
        name = self.train_list[0][0] if train else self.test_list[0][0]
        with open(Path(root) / self.base_folder / name, "rb") as file:  # its checksum was verified just now
            self.targets = pickle.load(file, encoding="latin1")["coarse_labels"]


def _class_names(dataset: Any) -> list[str]:
    """Names in label order, from the dataset or its reader; empty where neither knows them."""
    mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    return [str(name) for name in getattr(dataset, "classes", None) or ()]


def _open_folder(root: Path, config: DataConfig, val_only: bool = False) -> Splits:
    if not root.is_dir():
        known = [*BUILTIN, *(prefix + "NAME" for prefix in PREFIXES)]
        raise UserError(f"no data folder {str(root)!r}{nearest(str(root), BUILTIN)} (a folder, or {', '.join(known)})")
    train_root = root / (config.train_split or "train")
    if train_root.is_dir():
        return _open_train_val(root, train_root, config, val_only)
    if config.train_split:
        raise UserError(f"no split {config.train_split!r} in {root}{nearest(config.train_split, _folders(root))}")
    classes = _class_folders(root)
    if config.val_fraction is None:
        raise UserError(
            f"{root} has no train/ folder; for class folders alone say how much to hold out, such as --val-fraction 0.1"
        )
    source = _folder_source(root, classes)
    return _hold_out(source, source.labels(), classes, config.val_fraction)


def _open_train_val(root: Path, train_root: Path, config: DataConfig, val_only: bool) -> Splits:
    classes = _class_folders(train_root)
    names = [config.val_split] if config.val_split else list(VAL_FOLDERS)
    val_root = next((root / name for name in names if (root / name).is_dir()), None)
    if val_root is None:
        if config.val_split or config.val_fraction is None:
            raise UserError(
                f"{root} has no {', '.join(names)} folder beside train/; or hold out a part: --val-fraction 0.1"
            )
        source = _folder_source(train_root, classes)
        return _hold_out(source, source.labels(), classes, config.val_fraction)
    other = _class_folders(val_root)
    if other != classes:
        only = [f"{name} only in {train_root.name}" for name in sorted(set(classes) - set(other))]
        only += [f"{name} only in {val_root.name}" for name in sorted(set(other) - set(classes))]
        more = f" and {len(only) - 4} more" if len(only) > 4 else ""
        raise UserError(f"class folders of {train_root} and {val_root} differ: {', '.join(only[:4])}{more}")
    val = _folder_source(val_root, classes)
    train = val if val_only else _folder_source(train_root, classes)
    return Splits(train, val, classes, range(len(train)), range(len(val)))


def _folder_source(root: Path, classes: list[str]) -> TimmSource:
    class_map = {name: index for index, name in enumerate(classes)}
    try:
        dataset = create_dataset("", root=str(root), search_split=False, class_map=class_map)
    except RuntimeError:
        raise UserError(f"no images in {root}") from None
    return TimmSource(dataset)


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(root: Path) -> list[str]:
    classes = _folders(root)
    if not classes:
        raise UserError(f"{root} is empty: expected one folder of images for each class")
    return classes


def _hold_out(source: Source, labels: Sequence[int], classes: list[str], fraction: float) -> Splits:
    """A class-balanced split that depends on nothing but the images' order and the fraction."""
    rng = np.random.default_rng(0)
    train: list[int] = []
    val: list[int] = []
    for label in range(len(classes)):
        members = rng.permutation(np.flatnonzero(np.asarray(labels) == label))
        held = round(len(members) * fraction)
        val += members[:held].tolist()
        train += members[held:].tolist()
    if not val or not train:
        raise UserError(
            f"--val-fraction {fraction:g} of {len(labels)} images leaves {len(train)} to train, {len(val)} to validate"
        )
    return Splits(source, source, classes, sorted(train), sorted(val))


# --- images -> tensors ------------------------------------------------------------------------------------------------


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
    """Keys of one epoch, shuffled by (seed, epoch), from a position on."""

    def __init__(self, length: int, seed: int, shuffle: bool) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        offset = self.epoch * self.length
        if not self.shuffle:
            return iter(range(offset + self.start, offset + self.length))
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        )
        return iter((torch.randperm(self.length, generator=generator)[self.start :] + offset).tolist())

    def __len__(self) -> int:
        return self.length - self.start


class Loader:
    """Batches of one split on the device: raw images (B, 3, H, W) uint8 and labels (B,)."""

    def __init__(
        self,
        images: Any,
        batch_size: int,
        workers: int,
        device: torch.device,
        seed: int,
        training: bool,
        bad: BadImages,
    ) -> None:
        self.batch_size = batch_size
        self.device = device
        self.bad = bad
        self.stream: Any = images
        self.order = None if isinstance(images, IterableDataset) else Order(len(images), seed, shuffle=training)
        self.loader = DataLoader(
            images,
            batch_size=batch_size,
            sampler=self.order,
            num_workers=workers,
            collate_fn=_collate,
            drop_last=training,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0 and self.order is not None,  # a stream learns its epoch when workers start
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
            self.order.epoch, self.order.start = epoch, start * self.batch_size
        else:
            self.stream.set_epoch(epoch)
            skip = start
        for number, batch in enumerate(self.loader):
            self.bad.collect()
            if batch is not None and number >= skip:
                images, labels = batch
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
) -> Loader:
    """Shuffled, augmented batches. Raises UserError when the batch is larger than the data set."""
    transform = train_transform(augment, size, interpolation, mean)
    if splits.streaming:
        splits.train.transform = transform  # type: ignore[attr-defined]
        return Loader(splits.train, config.batch_size, config.workers, device, seed, True, bad)
    count = len(splits.train_indices)
    if config.batch_size > count:
        raise UserError(f"--batch-size {config.batch_size} is larger than the {count} training images")
    images = Images(splits.train, splits.train_indices, transform, seed, bad, training=True)
    return Loader(images, config.batch_size, config.workers, device, seed, True, bad)


def eval_loader(
    splits: Splits,
    config: DataConfig,
    size: tuple[int, int],
    interpolation: str,
    crop_pct: float,
    device: torch.device,
    bad: BadImages,
    limit: int | None = None,
) -> Loader:
    """Validation images in order, every one once; `limit` takes an even selection of them."""
    transform = eval_transform(size, interpolation, crop_pct)
    if splits.streaming:
        splits.val.transform = transform  # type: ignore[attr-defined]
        return Loader(splits.val, config.eval_batch_size, config.workers, device, 0, False, bad)
    indices = splits.val_indices
    if limit and limit < len(indices):
        indices = [indices[i * len(indices) // limit] for i in range(limit)]
    images = Images(splits.val, indices, transform, 0, bad, training=False)
    return Loader(images, config.eval_batch_size, config.workers, device, 0, False, bad)
