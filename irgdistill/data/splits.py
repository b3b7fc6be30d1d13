"""Indexed images, and which of them train and which validate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from irgdistill.errors import UserError


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

    def __str__(self) -> str:
        classes = f"{len(self.classes):,} classes"
        if self.streaming:
            return f"a stream of images of {classes}"
        return f"{len(self.train_indices):,} images of {classes} to train on, {len(self.val_indices):,} for validation"

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


def hold_out(source: Source, labels: Sequence[int], classes: list[str], fraction: float) -> Splits:
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


def balanced_subset(splits: Splits, count: int) -> list[int]:
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
