"""Named data sets through timm's factory: `torch/…`, `hfds/…`, `wds/…`. What is missing or unknown is one line."""

from __future__ import annotations

import json
import logging
import pickle
import tarfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.datasets import CIFAR100

from irgdistill.config import STREAMS, DataConfig
from irgdistill.errors import UserError, nearest

TORCH = ("cifar10", "cifar100", "cifar100-coarse", "mnist", "kmnist", "fashion_mnist", "qmnist")
"""Data sets of torchvision that have a training and a test half; timm takes any name but `train` for the latter."""


COARSE = "torch/cifar100-coarse"


OTHER_TORCH = ("imagenet", "places365", "inaturalist", "image_folder")


TRAIN, VAL = ("train", "training"), ("val", "validation", "test", "valid", "dev", "eval")


PACKAGES = {
    "hfds": ("datasets", "'irgdistill[hf]'"),
    "hfids": ("datasets", "'irgdistill[hf]'"),
    "wds": ("webdataset", "'irgdistill[webdataset]'"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
}
"""Package that a prefix needs, and what pip installs it with."""


IMAGES = "jpg;jpeg;png;webp"
"""Endings of the images in shards."""


class Stream(IterableDataset[Any]):
    """A streamed timm dataset that begins every epoch alike, however it was left."""

    def __init__(self, dataset: Any, classes: int, name: str) -> None:
        self.dataset, self.classes, self.name = dataset, classes, name
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self.dataset.transform = self.transform
        reader = self.dataset.reader
        reader.ds = reader.worker_info = None  # built anew, its generators with it
        yield from self.dataset

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


def open_named(config: DataConfig) -> tuple[Any, Any]:
    """timm's datasets for training and validation, each an indexed one or a `Stream`; the second may be None.

    None where there is no validation split and `val_fraction` says how much to hold out. Raises UserError: a missing
    package or data set, an unknown split or column.
    """
    source = str(config.source)
    prefix = source.split("/")[0]
    package, install = PACKAGES.get(prefix, ("", ""))
    if package and find_spec(package) is None:
        raise UserError(f"--data {source} needs the package {package}: pip install {install}")
    splits = _splits(source, config)
    val = _pick(source, splits, config.val_split, VAL, "val_split", config.val_fraction is not None)
    train = _pick(source, splits, config.train_split, TRAIN, "train_split")
    opened = [None if name is None else _open(source, config, name, name == train) for name in (train, val)]
    return opened[0], opened[1]


def _splits(source: str, config: DataConfig) -> list[str]:
    """Names of all splits; [] where they are known only once the data set is open."""
    prefix, _, name = source.partition("/")
    if prefix == "torch":
        name = name.lower()
        if name not in (*TORCH, *OTHER_TORCH):
            known = (*TORCH, *OTHER_TORCH)
            raise UserError(
                f"unknown data set {source!r}{nearest(name, known)} (known: torch/ with {', '.join(known)})"
            )
        return [*TRAIN, *VAL] if name in TORCH else []
    if prefix in ("hfds", "hfids"):
        import datasets as hugging_face

        hugging_face.disable_progress_bars()
        try:
            return [str(split) for split in hugging_face.get_dataset_split_names(name)]
        except Exception as error:
            raise _cannot_open(source, config, error) from None
    if prefix == "wds":
        return list(_shards(shard_folder(source, config)))
    return []


def _pick(
    source: str, splits: Sequence[str], asked: str | None, usual: Sequence[str], key: str, optional: bool = False
) -> str | None:
    """The split that was asked for, or the first usual one there is. Raises UserError, with the nearest."""
    if asked is not None:
        pattern = ".tar" in asked  # shards by their names, as timm takes them
        if splits and not pattern and asked.split("[")[0] not in splits:
            raise UserError(
                f"data.{key} = {asked!r}: {source} has no such split{nearest(asked, splits)} (there: {_list(splits)})"
            )
        return asked
    if not splits:
        return usual[0] if key == "train_split" else "validation"
    found = next((name for name in usual if name in splits), None)
    if found is None and not optional:
        remedy = " or --val-fraction 0.1" if key == "val_split" else ""
        raise UserError(
            f"{source} has no split {' or '.join(usual[:3])} (there: {_list(splits)}): --set data.{key}=NAME{remedy}"
        )
    return found


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _open(source: str, config: DataConfig, split: str, training: bool) -> Any:
    prefix, root = source.split("/")[0], config.root
    classes = 0
    more: dict[str, Any] = {"input_key": config.image_key, "target_key": config.label_key}
    if prefix == "torch":
        more = {}
    if prefix == "wds":
        root = shard_folder(source, config)
        more["input_key"] = config.image_key or IMAGES
        split, classes = _counted(root, split, config)
    noise = logging.getLogger("timm.data.readers.reader_wds")
    level = noise.level
    noise.setLevel(logging.ERROR)  # that there is no _info.json
    try:
        if source == COARSE:
            return CoarseCifar100(str(root), split in TRAIN, config.download)
        dataset = create_dataset(
            source,
            root=str(root),
            split=split,
            is_training=training,
            download=config.download,
            batch_size=config.batch_size,
            **more,
        )
    except Exception as error:
        raise _cannot_open(source, config, error, f"the {split} split of ") from None
    finally:
        noise.setLevel(level)
    if prefix == "hfds":
        _check_columns(source, dataset.reader)
    if prefix + "/" not in STREAMS:
        return dataset
    if prefix == "wds" and training and config.workers > len(dataset.reader.split_info.filenames):
        shards = len(dataset.reader.split_info.filenames)
        raise UserError(f"--workers {config.workers}: the {shards} training shards feed at most as many")
    classes = config.num_classes or len(getattr(dataset.reader, "class_to_idx", None) or ()) or classes
    if not classes:
        raise UserError(f"{source} does not tell its classes: give --set data.num_classes=N")
    return Stream(dataset, classes, source)


def _cannot_open(source: str, config: DataConfig, error: Exception, what: str = "") -> UserError:
    hint = "" if config.download or source.startswith(("hfds/", "wds/")) else "; --download lets it fetch its files"
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"cannot open {what}{source} in {config.root}: {text}{hint}")


def _check_columns(source: str, reader: Any) -> None:
    """Images and whole numbers as labels are where the reader will look for them. Raises UserError."""
    features = reader.dataset.features
    for key, column in (("image_key", reader.image_key), ("label_key", reader.label_key)):
        data = reader.dataset.data  # what the reader asked for in vain is a column of nothing
        names = [name for name in data.column_names if data.column(name).null_count < len(data)]
        if column not in names:
            raise UserError(
                f"{source} has no column {column!r}{nearest(column, names)} (there: {_list(names)}): "
                f"--set data.{key}=NAME"
            )
    kind = str(getattr(features[reader.label_key], "dtype", ""))
    if not kind.startswith(("int", "uint")):
        raise UserError(
            f"column {reader.label_key!r} of {source} holds {kind or 'lists'}, not classes: save it once with "
            f"dataset.class_encode_column({reader.label_key!r}), or name another with --set data.label_key=NAME"
        )


class CoarseCifar100(CIFAR100):  # type: ignore[misc]
    """CIFAR-100 under its 20 coarse classes (`torch/cifar100-coarse`)."""

    meta: ClassVar[dict[str, str]] = {**CIFAR100.meta, "key": "coarse_label_names"}

    def __init__(self, root: str, train: bool, download: bool) -> None:
        super().__init__(root, train=train, download=download)
        name = self.train_list[0][0] if train else self.test_list[0][0]
        with open(Path(root) / self.base_folder / name, "rb") as file:  # its checksum was verified just now
            self.targets = pickle.load(file, encoding="latin1")["coarse_labels"]


# --- shards -----------------------------------------------------------------------------------------------------------


def shard_folder(source: str, config: DataConfig) -> Path:
    """`wds/FOLDER`, or `--data-root` where there is no such folder."""
    folder = Path(source.partition("/")[2])
    return folder if str(folder) != "." and folder.is_dir() else config.root


def _shards(folder: Path) -> dict[str, list[str]]:
    """Split -> file names: as _info.json has them, or shards by what stands before their number: `train-000.tar`."""
    for name in ("_info.json", "info.json"):
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


def _described(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("_info.json", "info.json"))


def _counted(folder: Path, split: str, config: DataConfig) -> tuple[str, int]:
    """timm's description of a split: its name in _info.json, or its shards and how many images they hold; classes.

    The classes are 0 where they were not counted. Raises UserError for shards without any.
    """
    if ".tar" in split or _described(folder):
        return split, 0
    names = _shards(folder)[split]
    images, classes = _scan([folder / name for name in names])
    if not classes and not config.label_key:
        raise UserError(f"no classes (.cls) in {folder / names[0]}; of a field in its .json: --set data.label_key=NAME")
    return "::".join(names) + f"|{images}", classes


def _scan(shards: Sequence[Path]) -> tuple[int, int]:
    """Images in shards, and their classes: one more than the largest. Raises UserError."""
    images, largest = 0, -1
    for path in shards:
        try:
            with tarfile.open(path) as file:
                for member in file:
                    ending = member.name.rpartition(".")[2].lower()
                    images += ending in IMAGES.split(";")
                    if ending == "cls":
                        largest = max(largest, int(file.extractfile(member).read()))  # type: ignore[union-attr]
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path} is not a readable shard: {' '.join(str(error).split())}") from None
        except ValueError as error:
            raise UserError(f"{path}: a .cls file must hold a whole number, {error}") from None
    if not images:
        raise UserError(f"no images ({IMAGES.replace(';', ', ')}) in {shards[0]}")
    return images, largest + 1
