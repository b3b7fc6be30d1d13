"""`wds/FOLDER`: shards in the WebDataset format, streamed."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

from irgdistill.data.sources import source
from irgdistill.errors import UserError, one_line

if TYPE_CHECKING:
    from irgdistill.config import DataConfig
    from irgdistill.data.splits import Splits

PREFERRED = ("jpg", "jpeg", "png", "webp")
"""Endings of the images in shards, of which the first is read if a sample has several; any others come after them."""


INFO = ("_info.json", "info.json")
"""Files that describe splits of shards to timm."""


@source("wds/", local=True, package="webdataset", install="'irgdistill[webdataset]'")
def stream_shards(config: DataConfig, val_only: bool = False) -> Splits:
    """Raises UserError for missing or unreadable shards, an unknown split or an unknown number of classes."""
    from irgdistill.data.decoding import open_image
    from irgdistill.data.timm_dataset import create, open_stream

    folder = shard_folder(config).resolve()  # an absolute path is never taken for a URL

    def open_split(split: str, training: bool) -> tuple[Any, int]:
        split, classes = _counted(folder, split, config)
        columns = {"input_key": config.image_key or ";".join(_endings()), "target_key": config.label_key}
        columns["input_img_mode"] = ""  # no conversion
        with _no_warning_about_info():
            dataset = create(config, split, training, columns, folder)
        shards = len(dataset.reader.split_info.filenames)
        if training and config.workers > shards:
            raise UserError(f"--workers {config.workers}: the {shards} training shards feed at most as many")
        return dataset, classes

    return open_stream(config, list(_shards(folder)), open_split, open_image, hand_out_bytes)


class Encoded(io.BytesIO):
    """An image file as timm's reader found it, which it takes for a decoded image."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file.read())

    def load(self) -> None: ...


def hand_out_bytes(reader: Any) -> None:
    """Let timm's reader of shards leave the decoding to us: it calls `Image.open(file)`, then `load()`."""
    from timm.data.readers import reader_wds

    reader_wds.Image = SimpleNamespace(open=Encoded)


def shard_folder(config: DataConfig) -> Path:
    """FOLDER of `wds/FOLDER`, or `--data-root` if there is no such folder."""
    folder = Path(str(config.source).partition("/")[2])
    return folder if str(folder) != "." and folder.is_dir() else config.root


def _endings() -> dict[str, None]:
    """Endings of images without their dot, in order of preference."""
    from irgdistill.data.decoding import image_endings

    return dict.fromkeys([*PREFERRED, *sorted(ending[1:] for ending in image_endings())])


@contextmanager
def _no_warning_about_info() -> Iterator[None]:
    """timm warns about a missing _info.json, which we replace by counting."""
    log = logging.getLogger("timm.data.readers.reader_wds")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _shards(folder: Path) -> dict[str, list[str]]:
    """Split -> file names, from _info.json or from what precedes the number in a name: `train-000.tar`."""
    for name in INFO:
        if (folder / name).is_file():
            try:
                splits = json.loads((folder / name).read_text(encoding="utf-8"))["splits"]
                return {str(split): list(facts["filenames"]) for split, facts in splits.items()}
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{folder / name} does not describe splits of shards as timm reads them") from None
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.tar")):
        found.setdefault(path.stem.rstrip("0123456789").rstrip("-_"), []).append(path.name)
    if not found:
        raise UserError(f"no shards (*.tar) in {folder}: --data wds/FOLDER or --data-root FOLDER")
    return found


def _counted(folder: Path, split: str, config: DataConfig) -> tuple[str, int]:
    """A split as timm takes it, and its number of classes: a name in _info.json, or its shards and number of images.

    The number of classes is 0 if it was not counted. Raises UserError for shards without classes.
    """
    if ".tar" in split or any((folder / name).is_file() for name in INFO):
        return split, 0
    names = _shards(folder)[split]
    images, classes = _scan([folder / name for name in names])
    if not classes and not config.label_key:
        raise UserError(
            f"no classes (.cls) in {folder / names[0]}; for a field of its .json: --set data.label_key=NAME"
        )
    return "::".join(names) + f"|{images}", classes


def _scan(shards: Sequence[Path]) -> tuple[int, int]:
    """Number of images in shards, and of classes: one more than the largest. Raises UserError."""
    images, largest, endings = 0, -1, _endings()
    for path in shards:
        try:
            with tarfile.open(path) as file:
                for member in file:
                    suffix = member.name.rpartition(".")[2].lower()
                    images += suffix in endings
                    if suffix == "cls":
                        largest = max(largest, int(file.extractfile(member).read()))  # type: ignore[union-attr]
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path} is not a readable shard: {one_line(error)}") from None
        except ValueError as error:
            raise UserError(f"{path}: a .cls file must hold a whole number, {error}") from None
    if not images:
        raise UserError(f"no images ({', '.join(PREFERRED)}, …) in {shards[0]}")
    return images, largest + 1
