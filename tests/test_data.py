"""Folders, splits, seeds, bad images."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from torchvision import datasets

from irgdistill.config import AugmentConfig, DataConfig
from irgdistill.data import BadImages, Images, Loader, Order, eval_loader, train_loader
from irgdistill.distributed import World
from irgdistill.errors import UserError
from irgdistill.sources import CoarseCifar100, open_splits

MEAN = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")


def loader(config: DataConfig, bad: BadImages | None = None, seed: int = 0, **augment: object) -> Loader:
    return train_loader(
        open_splits(config),
        config,
        AugmentConfig(**augment),  # type: ignore[arg-type]
        (16, 16),
        "bilinear",
        MEAN,
        CPU,
        seed,
        bad or BadImages(10),
    )


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_folder_with_a_validation_split(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "train", {"a": 3, "b": 4})
    write_images(tmp_path / name, {"a": 2, "b": 1})
    splits = open_splits(DataConfig(source=str(tmp_path)))
    assert splits.classes == ["a", "b"]
    assert (len(splits.train_indices), len(splits.val_indices)) == (7, 3)


def test_class_folders_alone_are_split_by_class(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 20, "b": 10})
    splits = open_splits(DataConfig(source=str(tmp_path), val_fraction=0.2))
    labels = splits.train.labels()
    assert Counter(labels[i] for i in splits.val_indices) == {0: 4, 1: 2}
    assert sorted([*splits.train_indices, *splits.val_indices]) == list(range(30))
    again = open_splits(DataConfig(source=str(tmp_path), val_fraction=0.2))
    assert again.val_indices == splits.val_indices


def test_digits() -> None:
    splits = open_splits(DataConfig(source="digits", val_fraction=0.25))
    assert len(splits.train) == 1797 and len(splits.val_indices) == pytest.approx(449, abs=5)
    image, label = splits.train.load(0)
    assert image.size == (8, 8) and image.mode == "RGB" and label == 0


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (lambda root: None, {"source": "nowhere"}, "no data folder 'nowhere'"),
        (lambda root: None, {"source": "digit"}, "did you mean digits"),
        (lambda root: None, {}, "no data: give --data"),
        (lambda root: (root / "train").mkdir(), {}, "is empty: expected one folder of images for each class"),
        (
            lambda root: (root / "train" / "a").mkdir(parents=True) or (root / "val" / "a").mkdir(parents=True),
            {},
            "no images in",
        ),
        (lambda root: write_images(root / "train", {"a": 1}), {}, "has no val, validation, test folder"),
        (lambda root: write_images(root, {"a": 1}), {}, "--val-fraction 0.1"),
        (lambda root: write_images(root / "train", {"a": 1}), {"train_split": "trian"}, "no split 'trian'"),
    ],
)
def test_missing_or_empty_data_is_one_line(tmp_path, make, config, message) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path)
    source = config.pop("source", str(tmp_path) if message != "no data: give --data" else None)
    with pytest.raises(UserError) as error:
        open_splits(DataConfig(source=source, **config))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_class_folders_that_differ_are_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": 1, "dog": 1})
    write_images(tmp_path / "val", {"cat": 1, "fox": 1})
    with pytest.raises(UserError, match="dog only in train, fox only in val"):
        open_splits(DataConfig(source=str(tmp_path)))


def test_batch_larger_than_the_data(folder: Path) -> None:
    with pytest.raises(UserError, match="--batch-size 100 is larger than the 72 training images"):
        loader(DataConfig(source=str(folder), batch_size=100))


def test_batches_are_raw_images(folder: Path) -> None:
    images, labels = next(loader(DataConfig(source=str(folder), batch_size=24)).epoch(0))
    assert images.shape == (24, 3, 16, 16) and images.dtype == torch.uint8
    assert labels.shape == (24,) and labels.dtype == torch.int64


def test_the_number_of_workers_changes_nothing(folder: Path) -> None:
    epochs = []
    for workers in (0, 2):
        config = DataConfig(source=str(folder), batch_size=24, workers=workers)
        source = loader(config, color_jitter=0.4, erase=0.5)
        epochs.append([batch for epoch in range(2) for batch in source.epoch(epoch)])
    for (a, x), (b, y) in zip(*epochs, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)
    assert not torch.equal(epochs[0][0][0], epochs[0][3][0])


def test_an_epoch_can_be_entered_in_the_middle(folder: Path) -> None:
    config = DataConfig(source=str(folder), batch_size=24, workers=0)
    whole = list(loader(config).epoch(3))
    rest = list(loader(config).epoch(3, start=1))
    assert len(whole) == 3 and len(rest) == 2
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[1:], rest, strict=True))


def test_loading_leaves_the_runs_random_states_alone(folder: Path) -> None:
    source = loader(DataConfig(source=str(folder), batch_size=24, workers=0))
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    next(source.epoch(0))
    assert torch.equal(torch.rand(1), expected[0]) and np.random.rand() == expected[1]


def test_every_image_once_an_epoch_in_an_order_of_its_own() -> None:
    order = Order(100, 10, seed=1, world=World())
    first = list(order)
    order.epoch = 1
    second = [key - 100 for key in order]
    assert sorted(first) == sorted(second) == list(range(100)) and first != second
    assert list(Order(100, 10, seed=2, world=World())) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_replaced_and_counted(folder: Path, workers: int) -> None:
    for name in ("003.png", "007.png"):
        (folder / "train" / "red" / name).write_bytes(b"not an image")
    said: list[str] = []
    bad = BadImages(2, said.append)
    source = loader(DataConfig(source=str(folder), batch_size=24, workers=workers), bad)
    batches = list(source.epoch(0))
    bad.collect()
    assert sum(len(labels) for _, labels in batches) == 72
    assert sorted(Path(name).name for name in bad.names) == ["003.png", "007.png"]
    assert len(said) == 2 and "unreadable image skipped (1 of 2 allowed)" in said[0]


def test_too_many_unreadable_images_stop(folder: Path) -> None:
    for i in range(3):
        (folder / "train" / "red" / f"{i:03d}.png").write_bytes(b"")
    source = loader(DataConfig(source=str(folder), batch_size=24, workers=0), BadImages(2))
    with pytest.raises(UserError, match=r"3 unreadable images, 2 allowed \(--max-bad-images\)"):
        for epoch in range(2):
            list(source.epoch(epoch))


def test_evaluation_leaves_unreadable_images_out(folder: Path) -> None:
    (folder / "val" / "blue" / "001.png").write_bytes(b"x")
    config = DataConfig(source=str(folder), eval_batch_size=5)
    bad = BadImages(1)
    source = eval_loader(open_splits(config), config, (16, 16), "bilinear", 1.0, CPU, bad)
    assert sum(len(labels) for _, labels in source.epoch()) == 23
    bad.collect()
    assert len(bad.names) == 1


def test_a_limited_evaluation_is_spread_over_the_classes(folder: Path) -> None:
    config = DataConfig(source=str(folder))
    source = eval_loader(open_splits(config), config, (16, 16), "bilinear", 1.0, CPU, BadImages(0), limit=6)
    labels = torch.cat([labels for _, labels in source.epoch()])
    assert torch.bincount(labels).tolist() == [2, 2, 2]


def test_pad_crop_keeps_the_scale_and_resized_crop_does_not(folder: Path) -> None:
    config = DataConfig(source=str(folder), batch_size=72, workers=0)
    padded, _ = next(loader(config, crop="pad", padding=4, hflip=0.0).epoch(0))
    assert (padded == 0).all(1).any(), "a padded crop shows black borders"
    resized, _ = next(loader(config, crop="resized", hflip=0.0).epoch(0))
    assert not (resized == 0).all(1).any()


def test_torchvision_names_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot open the train split of torch/cifar10 .*--download"):
        open_splits(DataConfig(source="torch/cifar10", root=tmp_path))


def test_coarse_labels_of_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file in the format of the real one, whose checksum alone is not looked at."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for split, count in (("train", 6), ("test", 4)):
        batch = {
            "data": np.zeros((count, 3072), dtype=np.uint8),
            "fine_labels": list(range(count)),
            "coarse_labels": [i % 2 for i in range(count)],
        }
        (folder / split).write_bytes(pickle.dumps(batch))
    names = {"fine_label_names": list("abcdefgh"), "coarse_label_names": ["even", "odd"]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    assert CoarseCifar100(str(tmp_path), True, False).targets == [0, 1, 0, 1, 0, 1]
    splits = open_splits(DataConfig(source="torch/cifar100-coarse", root=tmp_path))
    assert splits.classes == ["even", "odd"] and len(splits.val_indices) == 4


def test_an_image_too_many_in_a_row_is_left_out() -> None:
    class Broken:
        def load(self, index: int) -> None:
            raise OSError("gone")

        def describe(self, index: int) -> str:
            return f"image {index}"

    bad = BadImages(3)
    images = Images(Broken(), range(10), None, 0, bad, training=True)  # type: ignore[arg-type]
    assert images[0] is None
    with pytest.raises(UserError, match="4 unreadable images"):
        bad.collect()
