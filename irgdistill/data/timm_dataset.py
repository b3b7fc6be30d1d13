"""Data sets through timm's factory: finds their splits, opens them, and explains failures in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import IterableDataset

from irgdistill.config import DataConfig
from irgdistill.data.decoding import open_image, to_rgb
from irgdistill.data.splits import Splits, hold_out
from irgdistill.errors import UserError, nearest, one_line
from irgdistill.runtime import sharing_context

Decode = Callable[[Any, bool], Image.Image]
"""What a reader hands out, and whether photos are turned upright -> RGB."""


TRAIN, VAL = ("train", "training"), ("val", "validation", "test", "valid", "dev", "eval")
"""Usual names of splits, the preferred first."""


class TimmSource:
    """An indexed timm or torchvision data set without a transform."""

    def __init__(self, dataset: Any, exif_orientation: bool = True) -> None:
        self.dataset = dataset
        self.exif_orientation = exif_orientation
        self.reader = getattr(dataset, "reader", None)
        if callable(getattr(dataset, "loader", None)):  # torchvision's data sets of files
            dataset.loader = partial(open_image, exif_orientation=exif_orientation)

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is None:
            image, label = self.dataset[index][:2]
            return to_rgb(image, self.exif_orientation), int(label)
        handle, label = self.reader[index][:2]  # timm's ImageDataset would replace an unreadable image by its neighbour
        with handle:
            return open_image(handle, self.exif_orientation), int(label)

    def describe(self, index: int) -> str:
        try:
            name = self.reader.filename(index, absolute=True)  # type: ignore[union-attr]
        except (AttributeError, NotImplementedError, AssertionError):
            return f"image {index}"
        if hasattr(self.reader, "iter_targets"):  # rows of a table, whose names may repeat
            return f"image {index} ({name})"
        return str(name)

    def labels(self) -> list[int]:
        """Class of every image, without decoding if the data set lists them."""
        samples = getattr(self.reader, "samples", None)
        if samples is not None:
            return [int(label) for _, label in samples]
        targets = getattr(self.dataset, "targets", None)
        if targets is not None:
            return [int(label) for label in targets]
        if hasattr(self.reader, "iter_targets"):
            return [int(label) for label in self.reader.iter_targets()]  # type: ignore[union-attr]
        return [self.load(i)[1] for i in range(len(self))]


class Stream(IterableDataset[Any]):
    """A streamed timm data set. An epoch's images do not depend on how far earlier epochs were read.

    `prepare` is called with timm's reader before each epoch, in the process that reads.
    """

    def __init__(
        self, dataset: Any, classes: int, config: DataConfig, decode: Decode, prepare: Callable[[Any], object] | None
    ) -> None:
        self.dataset, self.classes, self.name = dataset, classes, str(config.source)
        self.exif_orientation = config.exif_orientation
        self.transform: Any = None
        self._decode, self._prepare = decode, prepare
        for count in vars(dataset.reader).values():
            if isinstance(count, SharedCount):  # the epoch, made for forked processes alone
                count.shared_epoch = sharing_context().Value("i", count.value)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        reader = self.dataset.reader
        reader.ds = reader.worker_info = None  # makes timm rebuild the pipeline, with fresh generators
        if self._prepare is not None:
            self._prepare(reader)
        for image, label in self.dataset:
            try:
                rgb = self._decode(image, self.exif_orientation)
            except (OSError, ValueError) as error:
                logging.getLogger(__name__).warning("unreadable image skipped: %s", one_line(error))
                continue
            yield self.transform(rgb), label

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def check(self, labels: Tensor) -> None:
        """Raises UserError for a label (B,) that is none of the classes."""
        wrong = labels[(labels < 0) | (labels >= self.classes)]
        if len(wrong):
            raise UserError(
                f"{self.name} has an image of class {int(wrong[0])}, data.num_classes = {self.classes}: "
                f"expected 0 to {self.classes - 1}"
            )


def open_indexed(config: DataConfig, splits: Sequence[str], open_split: Callable[[str, bool], Any]) -> Splits:
    """Splits of a timm data set, which `open_split` (split, training) opens; a part is held out if there is one only.

    `splits` are the names of all; empty if they are known only once the data set is open.
    """
    train_split, val_split = _choose_splits(config, splits)
    train_set = open_split(train_split, True)
    val_set = None if val_split is None else open_split(val_split, val_split == train_split)
    train = TimmSource(train_set, config.exif_orientation)
    names = _class_names(train_set) or [str(i) for i in range(max(train.labels()) + 1)]
    if val_set is None:
        return hold_out(train, train.labels(), names, config.val_fraction or 0.0)
    val = TimmSource(val_set, config.exif_orientation)
    return Splits(train, val, names, range(len(train)), range(len(val)))


def open_stream(
    config: DataConfig,
    splits: Sequence[str],
    open_split: Callable[[str, bool], tuple[Any, int]],
    decode: Decode = to_rgb,
    prepare: Callable[[Any], object] | None = None,
) -> Splits:
    """As `open_indexed`, for a data set without an index. `open_split` also returns the number of classes, or 0.

    `decode` and `prepare` are those of `Stream`; default: the reader hands out images of Pillow.
    """
    train_split, val_split = _choose_splits(config, splits)
    if val_split is None:
        raise UserError(f"{config.source} is a stream and no part of it can be held out: --set data.val_split=NAME")
    dataset, counted = open_split(train_split, True)
    classes = config.num_classes or len(getattr(dataset.reader, "class_to_idx", None) or ()) or counted
    if not classes:
        raise UserError(f"the number of classes of {config.source} is not known: give --set data.num_classes=N")
    train, val = (
        Stream(opened, classes, config, decode, prepare)
        for opened in (dataset, open_split(val_split, val_split == train_split)[0])
    )
    names = _class_names(dataset) or [str(i) for i in range(classes)]
    return Splits(train, val, names, range(0), range(0), streaming=True)  # type: ignore[arg-type]


def create(
    config: DataConfig,
    split: str,
    training: bool,
    columns: Mapping[str, str | None] | None = None,
    root: Path | None = None,
) -> Any:
    """timm's data set of one split in `root`. Raises UserError if it cannot be opened.

    `columns` are the arguments `input_key` and `target_key` of readers that have columns or fields, and others.
    """
    with explained(config, split):
        return create_dataset(
            str(config.source),
            root=str(root or config.root),
            split=split,
            is_training=training,
            download=config.download,
            batch_size=config.batch_size,
            **(columns or {}),
        )


@contextmanager
def explained(config: DataConfig, split: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises while it opens a data set into a UserError of one line."""
    try:
        yield
    except Exception as error:
        what = f"the {split} split of " if split else ""
        online = config.download or str(config.source).startswith(("hfds/", "wds/"))
        hint = "" if online else "; --download lets it fetch its files"
        text = one_line(error, 200)
        raise UserError(f"cannot open {what}{config.source} in {config.root}: {text}{hint}") from None


def listed(names: Sequence[str]) -> str:
    """The first eight names, for messages."""
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _choose_splits(config: DataConfig, splits: Sequence[str]) -> tuple[str, str | None]:
    """The training and the validation split; None: hold out a part of the first."""
    optional = config.val_fraction is not None
    val = _choose(str(config.source), splits, config.val_split, VAL, "val_split", optional)
    train = _choose(str(config.source), splits, config.train_split, TRAIN, "train_split")
    assert train is not None
    return train, val


def _choose(
    name: str, splits: Sequence[str], given: str | None, usual: Sequence[str], key: str, optional: bool = False
) -> str | None:
    """The split that was given, or the first usual one. Raises UserError with the nearest."""
    if given is not None:
        pattern = ".tar" in given  # shards by name, as timm takes them
        if splits and not pattern and given.split("[")[0] not in splits:
            raise UserError(
                f"data.{key} = {given!r}: {name} has no such split{nearest(given, splits)} (there: {listed(splits)})"
            )
        return given
    if not splits:
        return usual[0] if key == "train_split" else "validation"
    found = next((split for split in usual if split in splits), None)
    if found is None and not optional:
        remedy = " or --val-fraction 0.1" if key == "val_split" else ""
        raise UserError(
            f"{name} has no split {' or '.join(usual[:3])} (there: {listed(splits)}): --set data.{key}=NAME{remedy}"
        )
    return found


def _class_names(dataset: Any) -> list[str]:
    """Names in label order, from the data set or its reader; empty if neither has them."""
    mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    return [str(name) for name in getattr(dataset, "classes", None) or ()]
