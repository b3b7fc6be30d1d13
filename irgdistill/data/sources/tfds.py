"""`tfds/NAME`: TensorFlow Datasets, streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from irgdistill.data.sources import source

if TYPE_CHECKING:
    from irgdistill.config import DataConfig
    from irgdistill.data.splits import Splits


@source("tfds/", remote=True, package="tensorflow_datasets", install="tensorflow tensorflow-datasets")
def stream_tensorflow(config: DataConfig, val_only: bool = False) -> Splits:
    """Raises UserError for a missing data set or an unknown number of classes."""
    from irgdistill.data.timm_dataset import create, open_stream

    columns = {"input_key": config.image_key, "target_key": config.label_key}
    return open_stream(config, [], lambda split, training: (create(config, split, training, columns), 0))
