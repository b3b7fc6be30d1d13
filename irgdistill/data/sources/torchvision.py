"""`torch/NAME`: data sets of torchvision."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irgdistill.data.sources import source
from irgdistill.errors import UserError, nearest

if TYPE_CHECKING:
    from irgdistill.config import DataConfig
    from irgdistill.data.splits import Splits

TRAIN_TEST = ("cifar10", "cifar100", "cifar100-coarse", "mnist", "kmnist", "fashion_mnist", "qmnist")
"""Data sets with a training and a test part. timm takes any split but `train` for the test part: we check the name."""


OTHERS = ("imagenet", "places365", "inaturalist", "image_folder")


@source("torch/")
def open_torchvision(config: DataConfig, val_only: bool = False) -> Splits:
    """Raises UserError for an unknown data set, missing files or an unknown split."""
    from irgdistill.data.timm_dataset import TRAIN, VAL, create, explained, open_indexed

    name, known = str(config.source).removeprefix("torch/").lower(), (*TRAIN_TEST, *OTHERS)
    if name not in known:
        raise UserError(
            f"unknown data set {config.source!r}{nearest(name, known)} (known: torch/ with {', '.join(known)})"
        )

    def open_split(split: str, training: bool) -> Any:
        if name != "cifar100-coarse":
            return create(config, split, training)
        with explained(config, split):
            return coarse_cifar100(config.root, split in TRAIN, config.download)

    return open_indexed(config, [*TRAIN, *VAL] if name in TRAIN_TEST else [], open_split)


def coarse_cifar100(root: Path, train: bool, download: bool) -> Any:
    """CIFAR-100 with its 20 coarse classes, which torchvision does not read."""
    from torchvision.datasets import CIFAR100

    def read(name: str) -> Any:  # torchvision has just verified its checksum
        return pickle.loads((root / CIFAR100.base_folder / name).read_bytes(), encoding="latin1")

    dataset = CIFAR100(str(root), train=train, download=download)
    (name, _), *_ = CIFAR100.train_list if train else CIFAR100.test_list
    dataset.targets = read(name)["coarse_labels"]
    dataset.classes = read(CIFAR100.meta["filename"])["coarse_label_names"]
    return dataset
