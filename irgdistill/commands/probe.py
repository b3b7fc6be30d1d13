"""The probes of `irgdistill eval --probe`: how well the classes can be read from a network's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irgdistill.config import Config, DataConfig, validate
from irgdistill.data import OnePass, Source, Splits, open_splits
from irgdistill.errors import UserError
from irgdistill.io import Report
from irgdistill.models import CheckpointMetadata, Network, build_teacher
from irgdistill.runtime import choose_device, keep_memory
from irgdistill.training import embed, knn_top1, linear_top1

CLASSIFIERS = {"knn": knn_top1, "linear": linear_top1}
"""By the values of --probe."""


class Probe:
    """Fits one kind of classifier to the training images of a data set and scores it on the validation images.

    A teacher that several networks share is scored once.
    """

    def __init__(self, kind: str, config: Config, report: Report) -> None:
        self.kind, self.config, self.report = kind, config, report
        self.device = choose_device(config.runtime.device)
        keep_memory(self.device)
        self._teachers: dict[str, float | None] = {}

    def measure(
        self, network: Network, data: DataConfig, metadata: CheckpointMetadata | None, teacher: Network | None
    ) -> dict[str, Any]:
        """Top-1 of the network, and of `teacher` or else of the teacher that the checkpoint records, in percent.

        Raises UserError if the images have no labels, or have no order.
        """
        data = data.replaced({"labels": True, "labelled_fraction": None})
        splits = open_splits(data)
        if splits.streaming:
            raise UserError(f"--probe {self.kind}: {data.source} is a stream, whose images have no order")
        for note in splits.notes:
            self.report.line(note)
        values: dict[str, Any] = {
            f"{self.kind}_top1": self._top1(network, splits, data),
            "images": len(splits.val_indices),
            "training_images": len(splits.labelled_train_indices()),
        }
        record = None if metadata is None else metadata.teacher
        key = f"{teacher and id(teacher)} {record} {data}"
        if key not in self._teachers:
            ceiling = teacher or (None if record is None else self._recorded(record.model_dump()))
            self._teachers[key] = None if ceiling is None else self._top1(ceiling, splits, data)
        return {**values, f"teacher_{self.kind}_top1": self._teachers[key]}

    def _recorded(self, record: dict[str, Any]) -> Network | None:
        """The teacher that a checkpoint records; None, with a line that says why, if it is not to be had."""
        known = {key: record[key] for key in ("name", "checkpoint", "input_size", "pooling", "preprocessing")}
        try:
            return build_teacher(validate({"teacher": known}).teacher)
        except UserError as error:
            self.report.line(f"the teacher's own score is left out: {error}")
            return None

    def _top1(self, network: Network, splits: Splits, data: DataConfig) -> float:
        train = self._embedded(network, splits.train, splits.labelled_train_indices(), data)
        return CLASSIFIERS[self.kind](*train, *self._embedded(network, splits.val, splits.val_indices, data))

    def _embedded(
        self, network: Network, source: Source, indices: Sequence[int], data: DataConfig
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (n, D) and labels (n,) of the images that can be read, on the device."""
        images = OnePass(source, data, network.input, self.device, self.report.warn, indices, data.max_bad_images)
        embeddings, positions = embed(network, images, self.config.runtime.amp, self.report)
        labels = torch.tensor(source.labels())[torch.tensor(indices)[positions]]
        return embeddings.to(self.device), labels.to(self.device)
