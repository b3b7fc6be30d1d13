"""Opens the data that the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from irgdistill.config import DataConfig, check_source, find_source
from irgdistill.data.splits import Splits, balanced_subset
from irgdistill.data.unlabelled import PartlyLabelled, Unlabelled
from irgdistill.errors import UserError


def open_splits(config: DataConfig, val_only: bool = False, classes: Sequence[str] | int | None = None) -> Splits:
    """Open `config.source`. Raises UserError if images are missing, empty or inconsistent.

    Without labels, `classes` are the teacher's: their names, or how many.
    """
    check_source(config)
    splits = _open(config, val_only, classes)
    if config.labels and len(splits.classes) < 2:
        raise UserError(f"{config.source} has one class, {splits.classes[0]!r}; expected at least two")
    if config.train_images is not None and not val_only:
        splits.train_indices = balanced_subset(splits, config.train_images)
    if config.labelled_fraction is not None and not val_only:
        return _partly_labelled(splits, config.labelled_fraction)
    return splits


def _partly_labelled(splits: Splits, fraction: float) -> Splits:
    """The same with the labels of a class-balanced share of the training images. Raises UserError for a stream."""
    if splits.streaming:
        raise UserError(f"data.labelled_fraction = {fraction:g}: a stream has no index to choose images from")
    count = round(fraction * len(splits.train_indices))
    labelled = balanced_subset(splits, max(count, len(splits.classes)))
    return replace(splits, train=PartlyLabelled(splits.train, labelled), labelled_count=len(labelled))


def _open(config: DataConfig, val_only: bool, classes: Sequence[str] | int | None) -> Splits:
    entry = find_source(str(config.source))
    if not config.labels and entry.open_unlabelled is not None:
        assert classes is not None
        unlabelled: Splits = entry.open_unlabelled(config, val_only, classes)
        return unlabelled
    splits: Splits = entry.open(config, val_only)
    return splits if config.labels or splits.streaming else replace(splits, train=Unlabelled(splits.train))
