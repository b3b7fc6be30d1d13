"""`hfds/NAME` and `hfids/NAME`: Hugging Face data sets, indexed and streamed."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from irgdistill.data.sources import source
from irgdistill.errors import UserError, nearest

if TYPE_CHECKING:
    from PIL import Image

    from irgdistill.config import DataConfig
    from irgdistill.data.splits import Splits


@source("hfds/", local=True, remote=True, package="datasets", install="'irgdistill[hf]'")
def open_hugging_face(config: DataConfig, val_only: bool = False) -> Splits:
    """Raises UserError for a missing data set, an unknown split or column, or labels that are not classes."""
    from irgdistill.data.timm_dataset import create, open_indexed

    def open_split(split: str, training: bool) -> Any:
        dataset = create(config, split, training, _columns(config))
        _check_columns(str(config.source), dataset.reader)
        return dataset

    return open_indexed(config, _splits(config), open_split)


@source("hfids/", local=True, remote=True, package="datasets", install="'irgdistill[hf]'")
def stream_hugging_face(config: DataConfig, val_only: bool = False) -> Splits:
    """Raises UserError for a missing data set, an unknown split or an unknown number of classes."""
    from irgdistill.data.timm_dataset import create, open_stream

    columns = {**_columns(config), "input_img_mode": ""}  # no conversion
    open_split = lambda split, training: (create(config, split, training, columns), 0)  # noqa: E731
    return open_stream(config, _splits(config), open_split, decode, hand_out_bytes)


def hand_out_bytes(reader: Any) -> None:
    """Let timm's streaming reader leave the decoding to us: its images become their bytes or paths."""
    import datasets

    reader._lazy_init()
    reader.ds = reader.ds.cast_column(reader.input_key, datasets.Image(decode=False))


def decode(value: Mapping[str, Any], exif_orientation: bool) -> Image.Image:
    """RGB of an image that is not decoded: its bytes, else the file at its path or URL."""
    from irgdistill.data.decoding import open_image

    if value["bytes"] is not None:
        return open_image(io.BytesIO(value["bytes"]), exif_orientation)
    import fsspec

    with fsspec.open(value["path"]) as file:
        return open_image(file, exif_orientation)


def _columns(config: DataConfig) -> dict[str, str | None]:
    return {"input_key": config.image_key, "target_key": config.label_key}


def _splits(config: DataConfig) -> list[str]:
    import datasets

    from irgdistill.data.timm_dataset import explained

    datasets.disable_progress_bars()
    with explained(config):
        return [str(split) for split in datasets.get_dataset_split_names(str(config.source).partition("/")[2])]


def _check_columns(name: str, reader: Any) -> None:
    """Raises UserError unless the columns hold images and whole numbers."""
    from irgdistill.data.timm_dataset import listed

    features = reader.dataset.features
    for key, column in (("image_key", reader.image_key), ("label_key", reader.label_key)):
        data = reader.dataset.data  # timm adds the columns it does not find, full of nulls
        names = [name for name in data.column_names if data.column(name).null_count < len(data)]
        if column not in names:
            raise UserError(
                f"{name} has no column {column!r}{nearest(column, names)} (there: {listed(names)}): "
                f"--set data.{key}=NAME"
            )
    kind = str(getattr(features[reader.label_key], "dtype", ""))
    if not kind.startswith(("int", "uint")):
        raise UserError(
            f"column {reader.label_key!r} of {name} holds {kind or 'lists'}, not classes: save it once with "
            f"dataset.class_encode_column({reader.label_key!r}), or name another with --set data.label_key=NAME"
        )
