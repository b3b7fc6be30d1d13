"""Where images come from: folders and archives, timm's datasets, digits -> splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from irgdistill.config import BUILTIN, PREFIXES, STREAMS, DataConfig, check_source
from irgdistill.data.sources.digits import DigitsSource
from irgdistill.data.sources.folder import open_folder, open_unlabelled_folder
from irgdistill.data.sources.timm_dataset import open_named
from irgdistill.data.sources.unlabelled import Unlabelled
from irgdistill.data.splits import Splits, TimmSource, balanced_subset, hold_out
from irgdistill.errors import UserError


def open_splits(config: DataConfig, val_only: bool = False, classes: Sequence[str] | int | None = None) -> Splits:
    """Find the images of `config.source`. Raises UserError where they are missing, empty or do not fit together.

    Without labels `classes` are the teacher's: their names, or how many.
    """
    check_source(config)
    splits = _open(config, val_only) if config.labels else _open_unlabelled(config, val_only, classes)
    if config.labels and len(splits.classes) < 2:
        raise UserError(f"{config.source} has one class, {splits.classes[0]!r}: there is nothing to tell apart")
    if config.train_images is not None and not val_only:
        splits.train_indices = balanced_subset(splits, config.train_images)
    return splits


def _open(config: DataConfig, val_only: bool) -> Splits:
    source = config.source or ""
    if source in BUILTIN:
        digits = DigitsSource()
        return hold_out(digits, digits.labels(), [str(i) for i in range(10)], config.val_fraction or 0.3)
    if source.startswith(PREFIXES):
        return _open_named(source, config)
    return open_folder(Path(source), config, val_only)


def _open_unlabelled(config: DataConfig, val_only: bool, classes: Sequence[str] | int | None) -> Splits:
    """Training images whose labels are not seen, wherever they come from."""
    source = config.source
    if not source or source in BUILTIN or source.startswith(PREFIXES):
        splits = _open(config, val_only)
        return splits if splits.streaming else replace(splits, train=Unlabelled(splits.train))
    assert classes is not None
    return open_unlabelled_folder(Path(source), config, val_only, classes)


def _open_named(source: str, config: DataConfig) -> Splits:
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
        return hold_out(train, train.labels(), names, config.val_fraction or 0.0)
    val = TimmSource(opened[1])
    return Splits(train, val, names, range(len(train)), range(len(val)))


def _class_names(dataset: Any) -> list[str]:
    """Names in label order, from the dataset or its reader; empty where neither knows them."""
    mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    return [str(name) for name in getattr(dataset, "classes", None) or ()]
