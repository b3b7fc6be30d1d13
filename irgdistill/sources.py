"""Where images come from: folders, archives, timm's datasets, digits -> indexed images, splits and class names."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torchvision import datasets

from irgdistill.archive import TarSource
from irgdistill.errors import UserError, nearest
from irgdistill.named import PREFIXES, STREAMS, open_named
from irgdistill.settings import DataConfig
from irgdistill.unlabelled import IMAGE_SUFFIXES, PlainImages, Unlabelled

VAL_FOLDERS = ("val", "validation", "test")
BUILTIN = ("digits",)


class Source(Protocol):
    """Indexed images before any transform."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decoded RGB image and its class."""

    def describe(self, index: int) -> str:
        """Name of an image, for messages."""

    def labels(self) -> list[int]:
        """Class of every image."""


@dataclass
class Splits:
    """Training and validation images of one data set, with class names in label order."""

    train: Source
    val: Source
    classes: list[str]
    train_indices: Sequence[int]
    val_indices: Sequence[int]
    streaming: bool = False
    labelled: bool = True
    """Whether the validation images have labels."""

    def train_labels(self) -> list[int]:
        """Class of every training image, in the order of `train_indices`."""
        labels = self.train.labels()
        return [labels[i] for i in self.train_indices]


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
            name = self.reader.filename(index, absolute=True)  # type: ignore[union-attr]
        except (AttributeError, NotImplementedError, AssertionError):
            return f"image {index}"
        if hasattr(self.reader, "iter_targets"):  # rows of a table, whose names need not be different
            return f"image {index} ({name})"
        return str(name)

    def labels(self) -> list[int]:
        """Class of every image, without decoding where the dataset knows them."""
        samples = getattr(self.reader, "samples", None)
        if samples is not None:
            return [int(label) for _, label in samples]
        targets = getattr(self.dataset, "targets", None)
        if targets is not None:
            return [int(label) for label in targets]
        if hasattr(self.reader, "iter_targets"):
            return [int(label) for label in self.reader.iter_targets()]  # type: ignore[union-attr]
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


def open_splits(config: DataConfig, val_only: bool = False, classes: Sequence[str] | int | None = None) -> Splits:
    """Find the images of `config.source`. Raises UserError where they are missing, empty or do not fit together.

    Without labels `classes` are the teacher's: their names, or how many.
    """
    splits = _open(config, val_only) if config.labels else _open_unlabelled(config, val_only, classes)
    if config.train_images is not None and not val_only:
        splits.train_indices = _balanced(splits, config.train_images)
    return splits


def _open(config: DataConfig, val_only: bool) -> Splits:
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
    if source == "torch/cifar100-coarse":
        try:
            opened: Any = [CoarseCifar100(str(config.root), half, config.download) for half in (True, False)]
        except (RuntimeError, OSError) as error:
            hint = "" if config.download else "; --download lets it fetch its files"
            raise UserError(
                f"cannot open {source} in {config.root}: {' '.join(str(error).split())[:200]}{hint}"
            ) from None
    else:
        opened = open_named(config)
    if source.startswith(STREAMS):
        if opened[1] is None:
            raise UserError(f"{source} is a stream, of which no part can be held out: --set data.val_split=NAME")
        names = _class_names(opened[0].dataset) or [str(i) for i in range(opened[0].classes)]
        opened[1].classes = opened[0].classes
        return Splits(opened[0], opened[1], names, range(0), range(0), streaming=True)
    train = TimmSource(opened[0])
    names = _class_names(opened[0]) or [str(i) for i in range(max(train.labels()) + 1)]
    if opened[1] is None:
        return _hold_out(train, train.labels(), names, config.val_fraction or 0.0)
    val = TimmSource(opened[1])
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
    if root.is_file() and root.suffix == ".tar":
        return _open_archive(root, config)
    if root.is_file():
        raise UserError(f"--data {root} is a file: expected a folder, or an uncompressed .tar of class folders")
    if not root.is_dir():
        known = [*BUILTIN, *(prefix + "NAME" for prefix in PREFIXES)]
        raise UserError(f"no data folder {str(root)!r}{nearest(str(root), BUILTIN)} (a folder, or {', '.join(known)})")
    train_root = root / (config.train_split or "train")
    if train_root.is_dir():
        return _open_train_val(root, train_root, config, val_only)
    if train_root.with_name(f"{train_root.name}.tar").is_file():
        return _open_archives(root, train_root.with_name(f"{train_root.name}.tar"), config)
    if config.train_split:
        there = [*_folders(root), *(path.stem for path in root.glob("*.tar"))]
        raise UserError(f"no split {config.train_split!r} in {root}{nearest(config.train_split, there)}")
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
                f"{root} has no {', '.join(names)} folder beside train/{_near_split(config, root)}; "
                "or hold out a part: --val-fraction 0.1"
            )
        source = _folder_source(train_root, classes)
        return _hold_out(source, source.labels(), classes, config.val_fraction)
    _check_same(classes, _class_folders(val_root), train_root, val_root)
    val = _folder_source(val_root, classes)
    train = val if val_only else _folder_source(train_root, classes)
    return Splits(train, val, classes, range(len(train)), range(len(val)))


def _check_same(classes: Sequence[str], other: Sequence[str], one: Path, two: Path) -> None:
    if other != classes:
        only = [f"{name} only in {one.name}" for name in sorted(set(classes) - set(other))]
        only += [f"{name} only in {two.name}" for name in sorted(set(other) - set(classes))]
        more = f" and {len(only) - 4} more" if len(only) > 4 else ""
        raise UserError(f"class folders of {one} and {two} differ: {', '.join(only[:4])}{more}")


def _open_archives(root: Path, train_tar: Path, config: DataConfig) -> Splits:
    """train.tar and val.tar, each of class folders."""
    train = TarSource(train_tar)
    names = [config.val_split] if config.val_split else list(VAL_FOLDERS)
    val_tar = next((path for name in names if (path := root / f"{name}.tar").is_file()), None)
    if val_tar is None:
        if config.val_split or config.val_fraction is None:
            raise UserError(
                f"{root} has no {', '.join(names)} .tar beside {train_tar.name}{_near_split(config, root)}; "
                "or hold out a part: --val-fraction 0.1"
            )
        return _hold_out(train, train.labels(), train.classes, config.val_fraction)
    val = TarSource(val_tar)
    _check_same(train.classes, val.classes, train_tar, val_tar)
    return Splits(train, val, train.classes, range(len(train)), range(len(val)))


def _open_archive(path: Path, config: DataConfig) -> Splits:
    """One .tar: of train/ and val/, or of class folders alone, with a part held out."""
    archive = TarSource(path)
    parts = archive.parts()
    for asked in (config.train_split, config.val_split):
        if asked and asked not in parts:
            raise UserError(f"no folder {asked!r} of class folders in {path}{nearest(asked, parts)}")
    train = parts.get(config.train_split or "train")
    val = next(
        (parts[name] for name in ([config.val_split] if config.val_split else VAL_FOLDERS) if name in parts), None
    )
    if train and val:
        return Splits(archive, archive, archive.classes, train, val)
    if config.val_fraction is None:
        raise UserError(f"{path} holds no train/ and val/; of class folders alone hold out a part: --val-fraction 0.1")
    chosen = train or range(len(archive))
    labels = archive.labels()
    splits = _hold_out(archive, [labels[i] for i in chosen], archive.classes, config.val_fraction)
    splits.train_indices, splits.val_indices = (
        [chosen[i] for i in part] for part in (splits.train_indices, splits.val_indices)
    )
    return splits


def _open_unlabelled(config: DataConfig, val_only: bool, classes: Sequence[str] | int | None) -> Splits:
    """Training images of any folder, their labels unseen; validation images with class folders, or as they are."""
    source, root = str(config.source), Path(config.source or "")
    if not config.source or source in BUILTIN or source.startswith(PREFIXES):
        splits = _open(config, val_only)
        return splits if splits.streaming else replace(splits, train=Unlabelled(splits.train))
    if not root.is_dir():
        raise UserError(f"no folder {source!r}: with --no-labels images are read from a folder or a named data set")
    assert classes is not None
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
    train_root = root / (config.train_split or "train")
    if config.train_split and not train_root.is_dir():
        raise UserError(f"no split {config.train_split!r} in {root}{nearest(config.train_split, _folders(root))}")
    val_names = [config.val_split] if config.val_split else list(VAL_FOLDERS)
    val_root = next((root / name for name in val_names if (root / name).is_dir()), None)
    if not train_root.is_dir() or val_root is None:
        if config.val_split or config.val_fraction is None:
            raise UserError(
                f"{root} has no train/ beside {', '.join(val_names)}{_near_split(config, root)}; "
                "or hold out images: --val-fraction 0.1"
            )
        images = PlainImages(train_root if train_root.is_dir() else root)
        splits = _hold_out(images, [0] * len(images), ["images"], config.val_fraction)
        return replace(splits, classes=names, labelled=False)
    val, labelled = _val_images(val_root, names)
    train = val if val_only else PlainImages(train_root)
    return Splits(train, val, names, range(len(train)), range(len(val)), labelled=labelled)


def _val_images(root: Path, classes: list[str]) -> tuple[Source, bool]:
    """Images of class folders, which must be the teacher's, True; or of a folder without classes, False."""
    folders = _folders(root)
    if not folders or any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir()):
        return PlainImages(root), False
    anonymous = classes == [str(i) for i in range(len(classes))]
    if folders != classes and not (anonymous and len(folders) == len(classes)):
        raise UserError(
            f"the {len(folders)} folders of {root} ({', '.join(folders[:3])}, …) are not the teacher's {len(classes)} "
            f"classes ({', '.join(classes[:3])}, …): without labels, put the images into {root} itself"
        )
    return _folder_source(root, folders), True


def _folder_source(root: Path, classes: list[str]) -> TimmSource:
    class_map = {name: index for index, name in enumerate(classes)}
    try:
        dataset = create_dataset("", root=str(root), search_split=False, class_map=class_map)
    except RuntimeError:
        raise UserError(f"no images in {root}") from None
    return TimmSource(dataset)


def _near_split(config: DataConfig, root: Path) -> str:
    """The folder or archive in `root` whose name is near to the validation split that was asked for."""
    there = [*_folders(root), *(path.stem for path in root.glob("*.tar"))]
    return nearest(config.val_split, there) if config.val_split else ""


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


def _balanced(splits: Splits, count: int) -> list[int]:
    """`count` of the training images, as many of each class as can be; depends on the images' order alone."""
    if splits.streaming:
        raise UserError(f"data.train_images = {count}: a stream has no list of images to choose from")
    if not len(splits.classes) <= count <= len(splits.train_indices):
        raise UserError(
            f"data.train_images = {count}: expected {len(splits.classes)} (one of each class) "
            f"to {len(splits.train_indices)} (all of them)"
        )
    rng = np.random.default_rng(0)
    labels = np.asarray(splits.train.labels())[list(splits.train_indices)]
    order = rng.permutation(len(labels))
    turn = np.empty(len(labels), dtype=int)  # how many of its class come before an image in `order`
    for label in range(len(splits.classes)):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    chosen = order[np.argsort(turn[order], kind="stable")[:count]]
    return sorted(int(splits.train_indices[i]) for i in chosen)
