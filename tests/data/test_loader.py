"""Folders, splits, seeds, bad images."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import input_spec, write_images
from torchvision import datasets

from irgdistill.config.input_spec import InputSpec
from irgdistill.config.schema import AugmentConfig, DataConfig
from irgdistill.data import augmentation
from irgdistill.data.augmentation import train_transform, transform_seeded
from irgdistill.data.dataset import Images, UnreadableImages
from irgdistill.data.image_cache import fits
from irgdistill.data.loader import Loader, eval_loader, train_loader
from irgdistill.data.one_pass import OnePass
from irgdistill.data.open import open_splits
from irgdistill.data.sampling import EpochSampler
from irgdistill.data.sources.torchvision import coarse_cifar100
from irgdistill.data.waiting import WaitMeter
from irgdistill.errors import DataError, UserError
from irgdistill.runtime.distributed import World

MEAN = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")


def loader(config: DataConfig, bad: UnreadableImages | None = None, seed: int = 0, **augment: object) -> Loader:
    return train_loader(
        open_splits(config),
        config,
        AugmentConfig(**augment),  # type: ignore[arg-type]
        InputSpec((16, 16), MEAN, MEAN, "bilinear", 1.0),
        CPU,
        seed,
        bad or UnreadableImages(10),
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
        (lambda root: None, {"source": "./irgdistil"}, "no data folder './irgdistil'; did you mean irgdistill"),
        (lambda root: None, {}, "no data: give --data"),
        (lambda root: (root / "train").mkdir(), {}, "holds no class folders: expected one folder"),
        (
            lambda root: (root / "train" / "a").mkdir(parents=True) or (root / "val" / "a").mkdir(parents=True),
            {},
            "no images in",
        ),
        (lambda root: write_images(root / "train", {"a": 1}), {}, "has no val, validation, test folder"),
        (lambda root: write_images(root, {"a": 1}), {}, "--val-fraction 0.1"),
        (
            lambda root: write_images(root, {"a": 9}),
            {"val_fraction": 0.3},
            "has one class, 'a'; expected at least two",
        ),
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


@pytest.mark.parametrize(
    "augment", [{}, {"padding": 0}, {"padding": 5, "hflip": 0.3}, {"crop": "none"}, {"hflip": 0.0}]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_images_held_in_memory_are_those_read_one_by_one(
    folder: Path, augment: dict[str, Any], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in three epochs, with an image that cannot be read; each is decoded once."""
    (folder / "train" / "red" / "003.png").write_bytes(b"not an image")
    epochs = {}
    for gib in (0, 1):
        config = DataConfig(source=str(folder), batch_size=24, workers=workers, image_cache_gib=gib)
        source = loader(config, **augment)
        assert (source.loader.dataset.cache is not None) == bool(gib)
        epochs[gib] = [batch for epoch in range(3) for batch in source.epoch(epoch)]
    for (a, x), (b, y) in zip(*epochs.values(), strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)
    source.loader.dataset.source.load = None  # nothing is left to read, in this process's memory too
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(source.epoch(0), epochs[1], strict=False))


@pytest.mark.parametrize(
    "augment", [{"color_jitter": 0.4}, {"erase": 0.5}, {"crop": "resized"}, {"auto_augment": "rand-m9"}]
)
def test_other_augmentation_is_not_done_in_batches(folder: Path, augment: dict[str, Any]) -> None:
    assert loader(DataConfig(source=str(folder), batch_size=24), **augment).loader.dataset.cache is None


def test_a_loader_that_is_waited_for_says_so_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = loader(DataConfig(source=str(folder), batch_size=24, workers=0), color_jitter=0.1)
    load = source.loader.dataset.source.load
    slow = lambda index: (time.sleep(0.002), load(index))[1]  # noqa: E731
    monkeypatch.setattr(source.loader.dataset.source, "load", slow)
    said = []
    for epoch in range(5):
        list(source.epoch(epoch))
        said.append((source.waiting.waited > 0.1, source.bottleneck(seconds=1.0 if epoch < 2 else 10.0, busy=0.0)))
        source.waiting.waited *= 30 if epoch == 1 else 1
    assert [waited for waited, _ in said] == [True] * 5
    assert [bool(text) for _, text in said] == [False, False, True, False, False]
    assert "--workers 0" in str(said[2][1])


@pytest.mark.parametrize(
    ("seconds", "busy", "advised"),
    [
        pytest.param(10.0, 0.0, True, id="waited"),
        pytest.param(10.0, 5.0, False, id="the device was busy meanwhile"),
        pytest.param(1000.0, 0.0, False, id="hardly waited"),
    ],
)
def test_advice_is_for_time_that_the_device_lost(seconds: float, busy: float, advised: bool) -> None:
    meter = WaitMeter(workers=0)
    assert meter.advice(10.0, 0.0) is None, "workers start before the first call"
    meter.waited = 1.5
    text = meter.advice(seconds, busy)
    assert (text is not None) == advised
    if text is not None:
        assert text.startswith("data loading took 15% of training time: ")


def test_what_is_held_has_a_limit() -> None:
    assert fits(50_000, (32, 32), gib=0.15) and not fits(50_000, (32, 32), gib=0.14)
    assert fits(1, (64, 64), gib=1) and not fits(1, (65, 64), gib=1)


def test_images_that_are_not_held_can_be_sent_to_other_processes(folder: Path) -> None:
    """As loaders do where processes do not fork."""
    images = loader(DataConfig(source=str(folder), batch_size=24, image_cache_gib=0)).loader.dataset
    images.queue = None  # belongs to the process that starts the others
    again = pickle.loads(pickle.dumps(images))
    for a, b in zip(images.__getitems__([3, 80]), again.__getitems__([3, 80]), strict=True):
        assert torch.equal(a, b)


def test_evaluation_from_memory_is_evaluation_from_files(folder: Path) -> None:
    batches = []
    for gib in (0, 1):
        config = DataConfig(source=str(folder), eval_batch_size=5, workers=0, image_cache_gib=gib)
        source = eval_loader(open_splits(config), config, input_spec(12, "bicubic", 0.8), CPU, UnreadableImages(1))
        batches.append([batch for _ in range(2) for batch in source.epoch()])
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(*batches, strict=True))


def test_views_come_again(folder: Path) -> None:
    """Two views of each image: epoch 2 shows those of epoch 0 in another order, whatever the run's seed."""
    shown = []
    for seed, epoch in ((0, 0), (0, 1), (0, 2), (7, 2)):
        config = DataConfig(source=str(folder), batch_size=72, workers=0, views=2, view_seed=5)
        images, _ = next(loader(config, seed=seed).epoch(epoch))
        shown.append(images)
    views = [{image.numpy().tobytes() for image in images} for images in shown]
    assert views[0] == views[2] == views[3] != views[1]
    assert not torch.equal(shown[0], shown[2]) and not torch.equal(shown[2], shown[3])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_view_of_each_image_follows_the_first_ones(folder: Path, workers: int) -> None:
    """First views are those of a run without second ones; both are the same from memory, and return with their key."""
    epochs = {}
    for gib in (0, 1):
        config = DataConfig(source=str(folder), batch_size=24, workers=workers, views=2, image_cache_gib=gib)
        config = config.replaced({"second_view": "rand-m9-n2-inc1"})
        epochs[gib] = [batch for epoch in (0, 2) for batch in loader(config).epoch(epoch)]
    plain = DataConfig(source=str(folder), batch_size=12, workers=workers, views=2)
    first = [batch for epoch in (0, 2) for batch in loader(plain).epoch(epoch)]
    assert len(first) == len(epochs[0]) == 12
    shown: dict[bytes, set[bytes]] = {}
    for (a, x), (b, y), (alone, labels) in zip(epochs[0], epochs[1], first, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y) and a.shape == (24, 3, 16, 16) and a.dtype == torch.uint8
        assert torch.equal(a[:12], alone) and torch.equal(x, labels.repeat(2)) and not torch.equal(a[:12], a[12:])
        for one, other in zip(a[:12], a[12:], strict=True):
            shown.setdefault(one.numpy().tobytes(), set()).add(other.numpy().tobytes())
    assert len(shown) == 72 and all(len(seconds) == 1 for seconds in shown.values())


@pytest.mark.parametrize("policy", ["rand-m1-n9", "rand-m10-n9-inc1", "v0"])
def test_every_policy_runs_at_every_magnitude(policy: str) -> None:
    """timm asks for posters of 0 bits. Assumes its attributes `ops`, `policy`, `name` and `aug_fn`."""
    transform = train_transform(AugmentConfig(crop="none", auto_augment=policy), input_spec(16))
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    for key in range(60):
        assert transform_seeded(0, key, transform, image).shape == (3, 16, 16)


def test_posters_of_no_bits_are_black_as_before_pillow_13(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batches as with Pillow's own function up to version 12, which masked any number of bits."""

    def old(image: Image.Image, bits: int) -> Image.Image:
        return image.point([i & ~(2 ** (8 - bits) - 1) for i in range(256)] * 3)

    def batches() -> torch.Tensor:
        train = loader(DataConfig(source=str(folder), batch_size=24), crop="none", auto_augment="rand-m2-n1")
        return torch.cat([images for epoch in range(3) for images, _ in train.epoch(epoch)])

    ours = batches()
    monkeypatch.setattr(augmentation, "_posterize_to_black", lambda steps: None)
    monkeypatch.setattr("timm.data.auto_augment.ImageOps.posterize", old)
    assert torch.equal(ours, batches())
    assert (ours == 0).flatten(1).all(1).any(), "some poster had no bits"


def test_a_second_view_that_cannot_be_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.second_view = 'strong' is not a timm policy"):
        loader(DataConfig(source=str(folder), batch_size=24, second_view="strong"))
    with pytest.raises(UserError, match="halves a batch: --batch-size 25 must be even"):
        loader(DataConfig(source=str(folder), batch_size=25, second_view="rand-m9"))


def test_a_part_of_the_training_images_is_balanced_and_always_the_same(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 9, "b": 3, "c": 9})
    write_images(tmp_path / "val", {"a": 1, "b": 1, "c": 1})

    def chosen(count: int) -> list[int]:
        return list(open_splits(DataConfig(source=str(tmp_path), train_images=count)).train_indices)

    splits = open_splits(DataConfig(source=str(tmp_path)))
    labels = splits.train.labels()
    for count, expected in ((3, [1, 1, 1]), (9, [3, 3, 3]), (13, [5, 3, 5]), (21, [9, 3, 9])):
        assert np.bincount([labels[i] for i in chosen(count)]).tolist() == expected
        assert chosen(count) == chosen(count) == sorted(chosen(count))
    assert set(chosen(3)) < set(chosen(9)) < set(chosen(13)), "more images are the same ones and others"
    for wrong in (2, 22):
        with pytest.raises(UserError, match=f"data.train_images = {wrong}: expected 3 .* to 21"):
            chosen(wrong)


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
    order = EpochSampler(100, 10, seed=1, world=World())
    first = list(order)
    order.epoch = 1
    second = [key - 100 for key in order]
    assert sorted(first) == sorted(second) == list(range(100)) and first != second
    assert list(EpochSampler(100, 10, seed=2, world=World())) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_replaced_and_counted(folder: Path, workers: int) -> None:
    for name in ("003.png", "007.png"):
        (folder / "train" / "red" / name).write_bytes(b"not an image")
    said: list[str] = []
    bad = UnreadableImages(2, said.append)
    source = loader(DataConfig(source=str(folder), batch_size=24, workers=workers), bad)
    batches = list(source.epoch(0))
    bad.collect()
    assert sum(len(labels) for _, labels in batches) == 72
    assert sorted(Path(name).name for name in bad.names) == ["003.png", "007.png"]
    assert len(said) == 2 and "unreadable image skipped (1 of 2 allowed)" in said[0]


def test_too_many_unreadable_images_stop(folder: Path) -> None:
    for i in range(3):
        (folder / "train" / "red" / f"{i:03d}.png").write_bytes(b"")
    source = loader(DataConfig(source=str(folder), batch_size=24, workers=0), UnreadableImages(2))
    with pytest.raises(UserError, match=r"3 unreadable images, 2 allowed \(--max-bad-images\)"):
        for epoch in range(2):
            list(source.epoch(epoch))


def test_evaluation_leaves_unreadable_images_out(folder: Path) -> None:
    (folder / "val" / "blue" / "001.png").write_bytes(b"x")
    config = DataConfig(source=str(folder), eval_batch_size=5)
    bad = UnreadableImages(1)
    source = eval_loader(open_splits(config), config, input_spec(16), CPU, bad)
    assert sum(len(labels) for _, labels in source.epoch()) == 23
    bad.collect()
    assert len(bad.names) == 1


@pytest.mark.parametrize(("batch", "workers"), [(24, 0), (23, 2)])
def test_a_single_batch_is_read_without_loader_processes(folder: Path, batch: int, workers: int) -> None:
    config = DataConfig(source=str(folder), eval_batch_size=batch, workers=2)
    images = OnePass(open_splits(config).val, config, input_spec(16), CPU, print)
    assert images.loader.loader.num_workers == workers


def test_a_limited_evaluation_is_spread_over_the_classes(folder: Path) -> None:
    config = DataConfig(source=str(folder))
    source = eval_loader(open_splits(config), config, input_spec(16), CPU, UnreadableImages(0), limit=6)
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
    assert coarse_cifar100(tmp_path, True, False).targets == [0, 1, 0, 1, 0, 1]
    splits = open_splits(DataConfig(source="torch/cifar100-coarse", root=tmp_path))
    assert splits.classes == ["even", "odd"] and len(splits.val_indices) == 4


def test_an_image_too_many_in_a_row_is_left_out() -> None:
    class Broken:
        def load(self, index: int) -> None:
            raise OSError("gone")

        def describe(self, index: int) -> str:
            return f"image {index}"

    bad = UnreadableImages(3)
    images = Images(Broken(), range(10), None, 0, bad, training=True)  # type: ignore[arg-type]
    assert images[0] is None
    with pytest.raises(UserError, match="4 unreadable images"):
        bad.collect()


def test_a_process_reports_only_as_many_unreadable_images_as_end_the_run(folder: Path) -> None:
    """The queue holds 64 KiB: a process that fills it would wait for a reader that waits for its batch."""
    for path in (folder / "val" / "red").iterdir():
        path.write_bytes(b"broken")
    said: list[str] = []
    bad = UnreadableImages(2, said.append)
    source = eval_loader(open_splits(DataConfig(source=str(folder))), DataConfig(workers=0), input_spec(16), CPU, bad)
    with pytest.raises(DataError, match="3 unreadable images, 2 allowed"):
        list(source.epoch())
    assert len(said) == 2 and bad.queue.empty()
