"""Indexed images, and which of them are for training and for validation. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from irgdistill.errors import UserError
from irgdistill.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
else:
    np = lazy("numpy")


VAL = ("val", "validation", "test")
"""Usual names of the validation split, the preferred first."""


UNLABELLED_FRACTION = 0.05
"""Share of images without labels that is held out if nothing tells how many; at least one image."""


class Source(Protocol):
    """Indexed images without a transform."""

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
    left_out: str = ""
    """The files that are no images, in words; empty for none."""
    empty: Sequence[str] = ()
    """Class folders without images, such as `zebra in train`."""
    labelled_count: int | None = None
    """Number of training images with a label; None: all of them, or none."""
    default_fraction: float | None = None
    """Share that is held out for validation although no setting asks for it; None if there is none."""

    def __str__(self) -> str:
        classes = f" of {len(self.classes):,} classes" if self.classes else ""
        if self.streaming:
            return f"a stream of images{classes}"
        some = "" if self.labelled_count is None else f" ({self.labelled_count:,} of them with their label)"
        train, val = len(self.train_indices), len(self.val_indices)
        return f"{train:,} images{classes} to train on{some}, {val:,} for validation"

    @property
    def notes(self) -> list[str]:
        """Lines for the log: what was left out, empty class folders, a share held out unasked, an unusual order."""
        empty = held_out = ""
        if self.empty:
            more = f" and {len(self.empty) - 8:,} more" if len(self.empty) > 8 else ""
            empty = f"class folders without images: {', '.join(self.empty[:8])}{more}"
        if self.default_fraction is not None:
            held_out = (
                f"no train/ with a validation folder: {100 * self.default_fraction:.3g} % of the images are held out "
                "for validation; --val-fraction sets another share"
            )
        return [line for line in (self.left_out, empty, held_out, _class_order(self.classes)) if line]

    @property
    def labelled_share(self) -> float:
        """Share of the training images that have a label, 1 unless `data.labelled_fraction` is set."""
        return 1.0 if self.labelled_count is None else self.labelled_count / len(self.train_indices)

    def train_labels(self) -> list[int]:
        """Class of every training image, in the order of `train_indices`."""
        labels = self.train.labels()
        return [labels[i] for i in self.train_indices]

    def labelled_train_indices(self) -> Sequence[int]:
        """The training images that have a label."""
        if self.labelled_count is None:
            return self.train_indices
        labels = self.train.labels()
        return [i for i in self.train_indices if labels[i] >= 0]


def _class_order(classes: Sequence[str]) -> str:
    """The order of classes that are named by whole numbers, in words; empty if it is the numeric one."""
    if not all(re.fullmatch("-?[0-9]{1,18}", name) for name in classes):
        return ""
    numeric = sorted(classes, key=int)
    first = next((i for i, name in enumerate(classes) if name != numeric[i]), None)
    if first is None:
        return ""
    shown = ", ".join(classes[:4]) + ", …" * (len(classes) > 4)
    return f"the order of the classes is not numeric: {shown} (class {first}, from 0, is {classes[first]})"


def hold_out(source: Source, labels: Sequence[int], classes: list[str], fraction: float) -> Splits:
    """Hold out a class-balanced `fraction` for validation; depends only on it and the order of images."""
    rng = np.random.default_rng(0)
    train: list[int] = []
    val: list[int] = []
    largest = 0
    for label in range(len(classes)):
        members = rng.permutation(np.flatnonzero(np.asarray(labels) == label))
        largest = max(largest, len(members))
        held = round(len(members) * fraction)
        val += members[:held].tolist()
        train += members[held:].tolist()
    if not val or not train:
        count = len(labels)
        raise UserError(
            f"--val-fraction {fraction:g} of {count} images leaves {len(train)} to train, {len(val)} to validate: "
            f"it is taken of each class, the largest of which holds {largest}; give another share or more images"
        )
    return Splits(source, source, classes, sorted(train), sorted(val))


def hold_out_unlabelled(source: Source, name: str, fraction: float | None) -> Splits:
    """Hold out a share of images without labels: `fraction`, else a small one. Raises UserError for one image.

    `name` is what the message calls the source. The splits have no classes.
    """
    default = None
    if fraction is None:
        if len(source) == 1:
            raise UserError(f"{name} holds one image: expected at least two, of which one is for validation")
        fraction = default = max(UNLABELLED_FRACTION, 1 / len(source))
    splits = hold_out(source, [0] * len(source), [name], fraction)
    return replace(splits, classes=[], labelled=False, default_fraction=default)


def balanced_subset(splits: Splits, count: int) -> list[int]:
    """`count` training images, classes as equal as possible; depends only on the order of images. Raises UserError."""
    if splits.streaming:
        raise UserError(f"data.train_images = {count}: a stream has no index to choose images from")
    if splits.labelled_count is not None:
        raise UserError(f"a balanced choice of {count} images needs every label, and some training images have none")
    if not len(splits.classes) <= count <= len(splits.train_indices):
        raise UserError(
            f"data.train_images = {count}: expected {len(splits.classes)} (one of each class) "
            f"to {len(splits.train_indices)} (all of them)"
        )
    rng = np.random.default_rng(0)
    labels = np.asarray(splits.train.labels())[list(splits.train_indices)]
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=int)  # how many images of its class precede it in `order`
    for label in range(len(splits.classes)):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    chosen = order[np.argsort(rank[order], kind="stable")[:count]]
    return sorted(int(splits.train_indices[i]) for i in chosen)
