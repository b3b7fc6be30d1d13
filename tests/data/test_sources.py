"""Every kind of data, from a small local copy, through one real epoch of `distill` and an `eval`."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import Run, input_spec, write_images, write_plugin
from torchvision import datasets as torchvision_datasets

from irgdistill.config import sources
from irgdistill.config.schema import AugmentConfig, DataConfig
from irgdistill.data.dataset import UnreadableImages
from irgdistill.data.loader import eval_loader, train_loader
from irgdistill.data.open import open_splits
from irgdistill.data.search import ImageSearch
from irgdistill.data.tar import TarSource
from irgdistill.errors import UserError
from irgdistill.io.tensors import read_metadata
from irgdistill.plugins import snapshot

SMALL = ("--input-size", 16, "--workers", 0, "--batch-size", 24, "--set", "runtime.log_every=1", "--seed", 3)
CLASSES = ["blue", "green", "red"]
huggingface = pytest.importorskip("datasets")
webdataset = pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface.config, "HF_HUB_OFFLINE", True)


def train_and_evaluate(run: Run, output: Path, source: object, *options: object, classes: int = 3) -> dict[str, Any]:
    """One epoch, then `eval` of the run, which finds its data by itself."""
    student = ("--student", "cifar_resnet14_x0_5", "--method", "none", "--epochs", 1, "--output", output)
    result = run("distill", "--data", source, *student, *SMALL, *options)
    assert result.code == 0, result.err
    assert "Generating" not in result.err and "WARNING" not in result.err, "libraries keep quiet"
    metadata = read_metadata(output / "best.safetensors")
    assert metadata is not None and len(metadata["classes"]) == classes
    evaluated = run("eval", output, "--json", "--workers", 0)
    assert evaluated.code == 0, evaluated.err
    values: dict[str, Any] = json.loads(evaluated.out)
    summary = json.loads((output / "summary.json").read_text())
    assert values["top1"] == pytest.approx(summary["top1"])
    return {**values, "classes": metadata["classes"], "err": result.err}


def refused(run: Run, *arguments: object) -> str:
    result = run("distill", "--student", "cifar_resnet14_x0_5", "--method", "none", *arguments)
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    return result.err


# --- torchvision ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Few images in the format of the real files, whose checksums alone are not looked at."""
    folder = tmp_path / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = [i % 10 for i in range(20)]
        pixels = rng.integers(0, 90, (20, 3, 1024)) + 12 * np.array(labels)[:, None, None]
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(20, -1).astype(np.uint8), "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return tmp_path / "root"


def test_torchvision(run: Run, cifar10: Path, tmp_path: Path) -> None:
    values = train_and_evaluate(run, tmp_path / "run", "torch/cifar10", "--data-root", cifar10, classes=10)
    assert values["images"] == 20 and values["classes"][3] == "class 3"


def test_torchvision_refuses_what_it_would_take_for_the_test_half(run: Run, cifar10: Path) -> None:
    message = refused(run, "--data", "torch/cifar10", "--data-root", cifar10, "--set", "data.train_split=trian")
    assert "data.train_split = 'trian'" in message and "did you mean train" in message
    assert "did you mean cifar10" in refused(run, "--data", "torch/cifr10", "--data-root", cifar10)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def rows(folder: Path) -> dict[str, list[Any]]:
    paths = sorted(folder.rglob("*.png"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    return {"image": images, "label": [CLASSES.index(path.parent.name) for path in paths]}


@pytest.fixture
def parquet(folder: Path, tmp_path: Path) -> Path:
    """Parquet files of a train and a test split."""
    features = huggingface.Features(image=huggingface.Image(), label=huggingface.ClassLabel(names=CLASSES))
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("test", "val")):
        table = huggingface.Dataset.from_dict(rows(folder / name), features=features)
        table.to_parquet(tmp_path / "parquet" / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "parquet"


@pytest.mark.parametrize("workers", [0, 2])
def test_hugging_face_parquet(run: Run, parquet: Path, tmp_path: Path, workers: int) -> None:
    options = ("--data-root", tmp_path / "cache", "--workers", workers)
    values = train_and_evaluate(run, tmp_path / "run", f"hfds/{parquet}", *options)
    assert values["classes"] == CLASSES and values["images"] == 24


@pytest.mark.parametrize("workers", [0, 1])
def test_hugging_face_stream(run: Run, parquet: Path, tmp_path: Path, workers: int) -> None:
    options = ("--data-root", tmp_path / "cache", "--download", "--workers", workers)
    values = train_and_evaluate(run, tmp_path / "run", f"hfids/{parquet}", *options)
    assert values["classes"] == CLASSES and values["images"] == 24


def test_hugging_face_image_folder(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    values = train_and_evaluate(run, tmp_path / "run", f"hfds/{folder.name}", "--data-root", tmp_path / "cache")
    assert values["classes"] == CLASSES and values["images"] == 24
    assert values["data"] == f"hfds/{folder}", "whatever folder it is evaluated from"


def test_hugging_face_labels_are_those_of_the_images(parquet: Path, tmp_path: Path) -> None:
    splits = open_splits(DataConfig(source=f"hfds/{parquet}", root=tmp_path / "cache"))
    labels = splits.train.labels()
    assert Counter(labels) == {0: 24, 1: 24, 2: 24}
    assert [splits.train.load(i)[1] for i in range(0, 72, 9)] == labels[::9]
    pixels = np.asarray(splits.train.load(0)[0])
    assert pixels.shape == (16, 16, 3)


def test_unreadable_images_of_a_table_are_counted_one_by_one(run: Run, folder: Path, tmp_path: Path) -> None:
    """Though their names are alike."""
    for name in ("red", "green"):
        (folder / "train" / name / "003.png").write_bytes(b"broken")
    features = huggingface.Features(image=huggingface.Image(), label=huggingface.ClassLabel(names=CLASSES))
    (tmp_path / "table").mkdir()
    for split, name in (("train", "train"), ("test", "val")):
        table = huggingface.Dataset.from_dict(rows(folder / name), features=features)
        table.to_parquet(tmp_path / "table" / f"{split}.parquet")
    source = f"hfds/{tmp_path / 'table'}"
    said = train_and_evaluate(run, tmp_path / "run", source, "--data-root", tmp_path / "cache")["err"]
    assert "(2 of 10 allowed)" in said and "image 27 (003.png)" in said and "image 51 (003.png)" in said


def test_hugging_face_part_of_one_split_is_held_out(parquet: Path, tmp_path: Path) -> None:
    (parquet / "data" / "test-00000-of-00001.parquet").unlink()
    config = DataConfig(source=f"hfds/{parquet}", root=tmp_path / "cache", val_fraction=0.25)
    splits = open_splits(config)
    assert (len(splits.train_indices), len(splits.val_indices)) == (54, 18)
    with pytest.raises(UserError, match=r"has no split val or validation or test .*--val-fraction 0.1"):
        open_splits(config.model_copy(update={"val_fraction": None}))


def test_hugging_face_errors_are_one_line(run: Run, folder: Path, parquet: Path, tmp_path: Path) -> None:
    source = ("--data", f"hfds/{parquet}", "--data-root", tmp_path / "cache")
    assert "did you mean train" in refused(run, *source, "--set", "data.train_split=trian")
    assert "no column 'lable'; did you mean label" in refused(run, *source, "--set", "data.label_key=lable")
    assert "--set data.image_key=NAME" in refused(run, *source, "--set", "data.image_key=img")
    assert "cannot open hfds/nowhere" in refused(run, "--data", "hfds/nowhere", "--data-root", tmp_path / "cache")
    words = huggingface.Dataset.from_dict({**rows(folder / "train"), "label": ["red"] * 72})
    (tmp_path / "words").mkdir()
    for split in ("train", "test"):
        words.cast_column("image", huggingface.Image()).to_parquet(tmp_path / "words" / f"{split}.parquet")
    message = refused(run, "--data", f"hfds/{tmp_path / 'words'}", "--data-root", tmp_path / "cache")
    assert "holds string, not classes" in message and "class_encode_column('label')" in message


# --- WebDataset -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """Three shards to train on and two for validation."""
    root = tmp_path / "shards"
    root.mkdir()
    for split, count in (("train", 3), ("val", 2)):
        paths = sorted((folder / split).rglob("*.png"))
        for number in range(count):
            with tarfile.open(root / f"{split}-{number:03d}.tar", "w") as file:
                for path in paths[number::count]:
                    label = str(CLASSES.index(path.parent.name)).encode()
                    for ending, content in (("png", path.read_bytes()), ("cls", label)):
                        add(file, f"{path.parent.name}{path.stem}.{ending}", content)
    return root


def add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_shards(run: Run, shards: Path, tmp_path: Path, workers: int) -> None:
    values = train_and_evaluate(run, tmp_path / "run", f"wds/{shards}", "--workers", workers)
    assert values["images"] == 24 and values["classes"] == ["0", "1", "2"]


def test_shards_described_by_a_file(run: Run, shards: Path, tmp_path: Path) -> None:
    splits = {
        name: {
            "name": name,
            "num_samples": samples,
            "filenames": [path.name for path in sorted(shards.glob(f"{name}-*"))],
            "shard_lengths": [samples // count] * count,
        }
        for name, samples, count in (("train", 72, 3), ("val", 24, 2))
    }
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    options = ("--data-root", shards, "--set", "data.num_classes=3")
    assert train_and_evaluate(run, tmp_path / "run", "wds/colours", *options)["images"] == 24
    assert "give --set data.num_classes=N" in refused(run, "--data", "wds/colours", "--data-root", shards)
    wrong = ("--data", "wds/colours", *options[:2], "--set", "data.num_classes=2", "--method", "none", *SMALL)
    result = run("distill", "--student", "cifar_resnet14_x0_5", *wrong, "--output", tmp_path / "wrong")
    assert result.code == 2 and "Traceback" not in result.err
    assert "wds/colours has an image of class 2, data.num_classes = 2: expected 0 to 1" in result.err


def stream(shards: Path, workers: int, epoch: int, start: int = 0) -> list[list[float]]:
    config = DataConfig(source=f"wds/{shards}", batch_size=24, workers=workers)
    augment = AugmentConfig(crop="none", hflip=0)
    splits = open_splits(config)
    loader = train_loader(splits, config, augment, input_spec(16), torch.device("cpu"), 0, UnreadableImages(0))
    return [images.float().mean((1, 2, 3)).tolist() for images, _ in list(loader.epoch(epoch, start))[: 3 - start]]


@pytest.mark.parametrize("workers", [0, 3])
def test_a_stream_can_be_entered_anywhere(shards: Path, workers: int) -> None:
    """A new loader begins any epoch as one that has gone through those before it."""
    first, second = stream(shards, workers, 0), stream(shards, workers, 1)
    every = [sorted(mean for batch in epoch for mean in batch) for epoch in (first, second)]
    assert every[0] == every[1] and len(every[0]) == 72 and first != second
    assert stream(shards, workers, 1, start=1) == second[1:]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_stream_is_validated_once(shards: Path, workers: int) -> None:
    config = DataConfig(source=f"wds/{shards}", batch_size=24, workers=workers)
    loader = eval_loader(open_splits(config), config, input_spec(16), torch.device("cpu"), UnreadableImages(0))
    for _ in range(2):
        labels = torch.cat([labels for _, labels in loader.epoch()])
        assert torch.bincount(labels).tolist() == [8, 8, 8]


def odd_images() -> list[tuple[bytes, str]]:
    """Files and their endings: a 16-bit PNG, a TIFF, a transparent GIF, a photo on its side, a program."""
    deep = Image.fromarray(np.full((16, 16), 32896, np.uint16))
    clear = Image.new("RGBA", (16, 16), (9, 9, 9, 0))
    side, exif = Image.new("L", (32, 16), 60), Image.Exif()
    side.paste(180, (16, 0, 32, 16))
    exif[0x0112] = 6
    files = []
    for image, ending in ((deep, "png"), (Image.new("L", (16, 16), 40), "tif"), (clear, "gif"), (side, "jpg")):
        content = io.BytesIO()
        image.save(content, {"tif": "TIFF", "jpg": "JPEG"}.get(ending, ending), exif=exif if ending == "jpg" else b"")
        files.append((content.getvalue(), ending))
    return [*files, (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "png")]


def check_odd_images(config: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    """They are those that a folder would give; the last is skipped. The upper half of the turned photo is darker."""
    loader = eval_loader(open_splits(config), config, input_spec(16), torch.device("cpu"), UnreadableImages(0))
    ((images, labels),) = list(loader.epoch())
    means = images.float().mean((1, 3))
    assert images.float().mean((1, 2, 3)).round().tolist() == [128, 40, 255, 120] and labels.tolist() == [0, 1, 0, 1]
    assert (means[3, :4].round() == 60).all() and (means[3, -4:].round() == 180).all()
    assert caplog.text.count("unreadable image skipped") == 1
    config = config.replaced({"exif_orientation": False})
    loader = eval_loader(open_splits(config), config, input_spec(16), torch.device("cpu"), UnreadableImages(0))
    ((images, _),) = list(loader.epoch())
    assert (images[3, :, :, :4] < 70).all(), "the photo as it is stored: its left half is darker"


def test_images_of_shards_are_read_as_those_of_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-000.tar", "w") as file:
            for number, (content, ending) in enumerate(odd_images()):
                add(file, f"{number}.{ending}", content)
                add(file, f"{number}.cls", str(number % 2).encode())
    check_odd_images(DataConfig(source=f"wds/{tmp_path}", batch_size=2, workers=0), caplog)


@pytest.mark.parametrize("inside", [True, False])
def test_images_of_a_hugging_face_stream_are_read_as_those_of_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, inside: bool
) -> None:
    """Whether the table holds their bytes or their paths."""
    values = []
    for number, (content, ending) in enumerate(odd_images()):
        path = tmp_path / f"{number}.{ending}"
        path.write_bytes(content)
        values.append({"bytes": content, "path": None} if inside else {"bytes": None, "path": str(path)})
    features = huggingface.Features(image=huggingface.Image(), label=huggingface.ClassLabel(names=["a", "b"]))
    table = huggingface.Dataset.from_dict({"image": values, "label": [0, 1, 0, 1, 0]}, features=features)
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        path = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        if inside:
            table.to_parquet(path)
        else:
            import pyarrow.parquet

            pyarrow.parquet.write_table(table.data.table, path)
    options = {"root": tmp_path / "cache", "download": True, "batch_size": 2, "workers": 0}
    check_odd_images(DataConfig(source=f"hfids/{tmp_path / 'set'}", **options), caplog)  # type: ignore[arg-type]


def test_shard_errors_are_one_line(run: Run, shards: Path, tmp_path: Path) -> None:
    source = ("--data", f"wds/{shards}")
    assert "did you mean train" in refused(run, *source, "--set", "data.train_split=trian")
    assert "the 3 training shards feed at most as many" in refused(run, *source, "--workers", 4)
    (tmp_path / "none").mkdir()
    assert "no shards (*.tar)" in refused(run, "--data", "wds/x", "--data-root", tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with tarfile.open(tmp_path / "bare" / "train-0.tar", "w") as file:
        add(file, "x.png", b"an image")
    bare = ("--data", f"wds/{tmp_path / 'bare'}", "--set", "data.val_split=train", "--set", "data.num_classes=3")
    assert "no classes (.cls) in" in refused(run, *bare)
    (shards / "train-001.tar").write_bytes(b"no archive")
    assert "train-001.tar is not a readable shard" in refused(run, *source)
    for path in shards.glob("val*"):
        path.unlink()
    (shards / "train-001.tar").unlink()
    assert "no part of it can be held out" in refused(run, *source, "--val-fraction", 0.1)


# --- archives ---------------------------------------------------------------------------------------------------------


def archive(path: Path, **folders: Path) -> Path:
    with tarfile.open(path, "w") as file:
        for name, folder in folders.items():
            file.add(folder, "" if name == "top" else name)
    return path


def test_an_archive_of_class_folders(run: Run, folder: Path, tmp_path: Path) -> None:
    source = archive(tmp_path / "images.tar", colours=folder / "train")
    values = train_and_evaluate(run, tmp_path / "run", source, "--val-fraction", 0.25, "--workers", 2)
    assert values["classes"] == CLASSES and values["images"] == 18
    assert "--val-fraction 0.1" in refused(run, "--data", source)


def test_an_archive_of_both_splits(run: Run, folder: Path, tmp_path: Path) -> None:
    source = archive(tmp_path / "all.tar", data=folder)
    splits = open_splits(DataConfig(source=str(source)))
    assert all("/train/" in splits.train.describe(i) for i in splits.train_indices)
    assert all("/val/" in splits.val.describe(i) for i in splits.val_indices)
    assert train_and_evaluate(run, tmp_path / "run", source)["images"] == 24
    assert "did you mean train" in refused(run, "--data", source, "--set", "data.train_split=trian")
    assert "did you mean val" in refused(run, "--data", source, "--set", "data.val_split=vall")


def test_archives_beside_each_other(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    archive(tmp_path / "tars" / "train.tar", top=folder / "train")
    assert "--val-fraction 0.1" in refused(run, "--data", tmp_path / "tars")
    archive(tmp_path / "tars" / "val.tar", top=folder / "val")
    assert train_and_evaluate(run, tmp_path / "run", tmp_path / "tars")["images"] == 24
    assert "did you mean train" in refused(run, "--data", tmp_path / "tars", "--set", "data.train_split=trian")
    assert "did you mean val" in refused(run, "--data", tmp_path / "tars", "--set", "data.val_split=vall")
    assert "did you mean val" in refused(run, "--data", folder, "--set", "data.val_split=vall")
    (folder / "val" / "red").rename(folder / "val" / "rde")
    archive(tmp_path / "tars" / "val.tar", top=folder / "val")
    assert "red only in train.tar, rde only in val.tar" in refused(run, "--data", tmp_path / "tars")


def test_an_archive_holds_what_the_folder_holds(tmp_path: Path) -> None:
    """Also where natural and plain order of the class names differ: labels are those of the unpacked folders."""
    folder = write_images(tmp_path / "folders", {"a2": 3, "a10": 4, "b": 2})
    source = TarSource(archive(tmp_path / "a.tar", top=folder), ImageSearch(100))
    unpacked = open_splits(DataConfig(source=str(folder), val_fraction=0.5))
    assert source.classes == unpacked.classes == ["a10", "a2", "b"]
    there = {Path(source.describe(i)).parts[-2:]: i for i in range(len(source))}
    for i in range(len(unpacked.train)):
        image, label = unpacked.train.load(i)
        other, same = source.load(there[Path(unpacked.train.describe(i)).parts[-2:]])
        assert label == same and np.array_equal(np.asarray(image), np.asarray(other))


def test_bad_archives_are_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"text")
    assert "is not an uncompressed tar archive" in refused(run, "--data", tmp_path / "bad.tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as file:
        file.add(folder / "train", "train")
    assert "is not an uncompressed tar archive" in refused(run, "--data", tmp_path / "packed.tar")
    (tmp_path / "packed.tar").rename(tmp_path / "packed.tgz")
    assert "is a file: expected a folder, or an uncompressed .tar" in refused(run, "--data", tmp_path / "packed.tgz")
    with tarfile.open(tmp_path / "empty.tar", "w") as file:
        add(file, "a/readme.txt", b"nothing")
    assert "no images in" in refused(run, "--data", tmp_path / "empty.tar")


def test_an_unreadable_image_in_an_archive_is_named(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "red" / "003.png").write_bytes(b"broken")
    source = archive(tmp_path / "images.tar", top=folder)
    assert "images.tar/train/red/003.png" in train_and_evaluate(run, tmp_path / "run", source)["err"]


# --- a source of your own ---------------------------------------------------------------------------------------------


def test_a_plugin_file_adds_a_source(run: Run, tmp_path: Path) -> None:
    assert "no data folder 'shades/120'" in refused(run, "--data", "shades/120")
    restore = snapshot()
    try:
        plugin = ("--plugin", write_plugin(tmp_path))
        found = train_and_evaluate(run, tmp_path / "run", "shades/120", "--val-fraction", 0.25, *plugin)
        assert "90 images of 3 classes to train on, 30 for validation" in found["err"]
        assert found["classes"] == ["dark", "middle", "light"]
        assert "shades/NAME" in refused(run, "--data", "shade/120")
    finally:
        restore()
    assert "no data folder 'shades/120'" in refused(run, "--data", "shades/120")


def test_the_longest_word_that_matches_is_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that only begin like a word are paths; folders are remembered by their absolute path."""
    words = {"digits": "digits", "digits2": "", "wds/x": "wds/", "wds": "", "hfds/a/b": "hfds/", "./wds/x": ""}
    words |= {"photos.csv": ".csv", "a/b.TSV": ".tsv", "wds/x.csv": "wds/", "csv": "", "digits.txt": ".txt"}
    assert {value: sources.find_source(value).word for value in words} == words
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "images", "cifar10"):
        (tmp_path / name).mkdir()
    kept = ("digits", "torch/cifar10", "hfds/other", "other")
    assert [sources.absolute_source(value) for value in kept] == list(kept)
    assert sources.absolute_source("images") == str(tmp_path / "images")
    (tmp_path / "a.csv").write_text("")
    assert sources.absolute_source("a.csv") == str(tmp_path / "a.csv")
    assert sources.absolute_source("wds/images") == f"wds/{tmp_path / 'images'}"


def test_sources_and_loggers_are_known_without_torch() -> None:
    code = "import sys; from irgdistill.config import source_words; from irgdistill.io import check_loggers; "
    code += "check_loggers(['tensorboard']); assert 'wds/NAME' in source_words(); "
    code += "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- missing packages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "install"),
    [
        ("hfds/cifar10", "pip install 'irgdistill[hf]'"),
        ("hfids/cifar10", "pip install 'irgdistill[hf]'"),
        ("wds/x", "pip install 'irgdistill[webdataset]'"),
        ("tfds/cifar10", "pip install tensorflow tensorflow-datasets"),
    ],
)
def test_a_missing_package_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, source: str, install: str) -> None:
    missing = {"datasets", "webdataset", "tensorflow_datasets"}
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name in missing else find_spec(name))
    assert install in refused(run, "--data", source)


def test_images_are_those_of_the_shards(shards: Path) -> None:
    """The first image of the first validation shard, read by hand."""
    with tarfile.open(shards / "val-000.tar") as file:
        member = next(m for m in file if m.name.endswith("png"))
        expected = np.asarray(Image.open(file.extractfile(member)))  # type: ignore[arg-type]
    config = DataConfig(source=f"wds/{shards}", batch_size=24, workers=0)
    loader = eval_loader(open_splits(config), config, input_spec(16), torch.device("cpu"), UnreadableImages(0))
    assert np.array_equal(next(loader.epoch())[0][0].permute(1, 2, 0).numpy(), expected)
