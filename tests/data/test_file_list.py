"""Images and labels from a list: the same as from class folders, and every bad row is one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import SMALL, Run, input_spec, write_images

from irgdistill.config import AugmentConfig, DataConfig
from irgdistill.data import Splits, UnreadableImages, eval_loader, open_splits, train_loader
from irgdistill.data.unlabelled import UNLABELLED
from irgdistill.errors import UserError

HEADER = ["image", "label", "split"]


def table(file: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    with file.open("w", newline="") as text:
        csv.writer(text, delimiter=delimiter).writerows(rows)
    return file


def rows_of(root: Path) -> list[list[str]]:
    """Path, class and split of every image of train/ and val/, in no useful order."""
    found = [[str(path.relative_to(root)), path.parent.name, path.parts[-3]] for path in root.rglob("*.png")]
    return sorted(found, key=lambda row: row[0][::-1])


def opened(source: Path, val_only: bool = False, classes: Any = None, **settings: Any) -> Splits:
    return open_splits(DataConfig(source=str(source), **settings), val_only=val_only, classes=classes)


def batches(source: Path, **settings: Any) -> list[torch.Tensor]:
    """Every tensor of an epoch and of the validation images."""
    data = DataConfig(source=str(source), batch_size=8, workers=0, **settings)
    splits, cpu, crop = open_splits(data), torch.device("cpu"), input_spec(16)
    train = train_loader(splits, data, AugmentConfig(), crop, cpu, 3, UnreadableImages(0))
    val = eval_loader(splits, data, crop, cpu, UnreadableImages(0))
    return [tensor for loader in (train, val) for batch in loader.epoch() for tensor in batch]


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_the_batches_are_those_of_class_folders(folder: Path, fraction: float | None) -> None:
    rows = [row for row in rows_of(folder) if fraction is None or row[2] == "train"]
    listed = table(folder / "photos.csv", [HEADER, *rows])
    source = folder if fraction is None else folder / "train"
    expected, found = batches(source, val_fraction=fraction), batches(listed, val_fraction=fraction)
    assert len(found) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_batches_without_labels_are_those_of_folders(folder: Path) -> None:
    listed = table(folder / "photos.csv", [HEADER, *rows_of(folder)])
    of_list, of_folder = (opened(source, labels=False, classes=0) for source in (listed, folder))
    assert [of_list.train.describe(i) for i in range(72)] == [of_folder.train.describe(i) for i in range(72)]
    assert set(of_list.train.labels()) == {UNLABELLED}
    assert of_list.val.labels() == of_folder.val.labels() and of_list.labelled


def test_header_delimiter_and_files(folder: Path) -> None:
    """A header may be missing, name its columns in other words, in another order; cells may be divided by ; or tabs."""
    rows = rows_of(folder)
    expected = opened(table(folder / "a.csv", rows))
    lists = [
        table(folder / "b.csv", [["Split", "file_name", "more", "CLASS"], *([s, p, "x", y] for p, y, s in rows)]),
        table(folder / "c.csv", rows, delimiter=";"),
        table(folder / "d.TSV", [HEADER, *rows], delimiter="\t"),
        table(folder / "e.csv", [[str(folder / path), f" {label} ", split] for path, label, split in rows]),
    ]
    (folder / "f.csv").write_text("\ufeff" + (folder / "a.csv").read_text() + "\n,,\n")
    for other in (*lists, folder / "f.csv"):
        found = opened(other)
        assert found.classes == expected.classes == ["blue", "green", "red"]
        assert found.train.labels() == expected.train.labels() and found.val.labels() == expected.val.labels()
        assert found.train.describe(5) == expected.train.describe(5), other
    renamed = table(folder / "g.csv", [["photo", "breed"], *(row[:2] for row in rows)])
    own = opened(renamed, val_fraction=0.5, image_key="photo", label_key="breed")
    assert own.classes == expected.classes and len(own.val_indices) == 48


def test_a_text_file_has_a_path_and_a_label_a_line(folder: Path) -> None:
    (folder / "train" / "red" / "000.png").rename(folder / "train" / "red" / "a b.png")
    lines = [f"{path} {label}" for path, label, split in rows_of(folder) if split == "train"]
    (folder / "train.txt").write_text("\n".join(lines))
    assert opened(folder / "train.txt", val_fraction=0.5).classes == ["blue", "green", "red"]
    (folder / "train.txt").write_text("\n".join(line.rpartition(" ")[0] for line in lines))
    plain = opened(folder / "train.txt", labels=False, classes=0)
    assert len(plain.train) == 72 and not plain.labelled and plain.default_fraction == 0.05


def test_splits_by_name(folder: Path) -> None:
    rows = [[path, label, {"train": "train", "val": "fold 1"}[split]] for path, label, split in rows_of(folder)]
    listed = table(folder / "photos.csv", [HEADER, *rows])
    assert len(opened(listed, val_split="fold 1").val_indices) == 24
    held = opened(listed, val_fraction=0.25)
    assert (len(held.train_indices), len(held.val_indices)) == (54, 18)
    assert held.notes == ["rows left out: 24 of split fold 1"]
    with pytest.raises(UserError, match=r"no rows of split 'fold 2'; did you mean fold 1\?"):
        opened(listed, val_split="fold 2")
    with pytest.raises(UserError, match=r"no rows of split val or validation or test; .* give --val-fraction 0.1"):
        opened(listed)


def test_whole_numbers_are_classes_in_their_order(folder: Path) -> None:
    names = {"red": "10", "green": "9", "blue": "2"}
    rows = [[path, names[label], split] for path, label, split in rows_of(folder)]
    found = opened(table(folder / "photos.csv", [HEADER, *rows]))
    assert found.classes == ["2", "9", "10"] and not found.notes


def test_rows_without_a_label_are_images_without_a_label(folder: Path) -> None:
    rows = [[path, label if i % 3 else "", split] for i, (path, label, split) in enumerate(rows_of(folder))]
    train = [row for row in rows if row[2] == "train"]
    rows = [*train, *(row for row in rows_of(folder) if row[2] == "val")]
    without = sum(not label for _, label, _ in train)
    found = opened(table(folder / "photos.csv", [HEADER, *rows]))
    assert found.train.labels().count(UNLABELLED) == without > 10 and len(found.train_indices) == 72
    assert str(found).startswith(f"72 images of 3 classes to train on ({72 - without} of them with their label)")
    assert len(found.labelled_train_indices()) == 72 - without

    held = opened(table(folder / "held.csv", [HEADER[:2], *(row[:2] for row in train)]), val_fraction=0.25)
    labels = held.train.labels()
    assert all(labels[i] != UNLABELLED for i in held.val_indices)
    assert held.labelled_count == len(held.train_indices) - without == len(held.labelled_train_indices())
    with pytest.raises(UserError, match="needs every label, and some training images have none"):
        opened(folder / "photos.csv", train_images=10)


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (["a.png,red,train", "nowhere.png,red,train"], {}, "photos.csv, line 2: no file "),
        (["image,label", "a.png,red", "b.png"], {}, "photos.csv, line 3: 1 cell, expected 2"),
        (["a.png,red", "b.png,green", "a.png,green"], {}, "line 3: {root}/a.png is also in line 1"),
        (["image,label", ",red"], {}, "line 2: no path of an image"),
        (["id,breed", "a.png,red"], {}, "line 1: no file {root}/id; a header names its column path, or --set data."),
        (["a.png,red,train,x"], {}, "line 1: 4 cells without a header: expected path, label and split"),
        (["image,label", "a.png,red"], {"label_key": "lable"}, "line 1: no column 'lable'; did you mean label?"),
        (["a.png", "b.png"], {"val_fraction": 0.5}, "has no labels: add a column label, or train with --no-labels"),
        (["a.png,red", "b.png,green"], {}, "has no column split; to hold out a part of its images, give --val-fract"),
        (["a.png,red,train", "b.png,green,val"], {}, "line 2: no image to train on has the label 'green'"),
        (["a.png,red,train", "b.png,,val"], {}, "line 2: a validation image needs a label"),
        (["a.png,red,val", "b.png,green,val"], {}, "has no rows of split 'train' (there: val)"),
        (["a.png,red", "b.png,red"], {"val_fraction": 0.5}, "has one class, 'red'; expected at least two"),
        ([], {}, "photos.csv lists no images"),
        (['a.png,"red\n' + "x" * 140_000], {}, "photos.csv, line 2: field larger than field limit (131072)"),
    ],
)
def test_a_bad_list_is_one_line(tmp_path: Path, lines: list[str], settings: dict[str, Any], message: str) -> None:
    write_images(tmp_path, {"x": 2})
    for old, new in (("000.png", "a.png"), ("001.png", "b.png")):
        (tmp_path / "x" / old).rename(tmp_path / new)
    (tmp_path / "photos.csv").write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        opened(tmp_path / "photos.csv", **settings)
    assert message.format(root=tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_train_eval_embed_and_predict(run: Run, folder: Path, tmp_path: Path) -> None:
    rows = rows_of(folder)
    unlabelled = [[row[0], row[1] if row[2] == "val" or i % 4 else "", row[2]] for i, row in enumerate(rows)]
    listed = table(folder / "photos.csv", [HEADER, *unlabelled])
    output, network = tmp_path / "run", ("--model", "cifar_resnet14_x0_5", "--epochs", 1)
    trained = run("train", *network, "--data", listed, "--output", output, *SMALL)
    assert trained.code == 0 and "of them with their label), 24 for validation" in trained.err, trained.err
    summary = json.loads((output / "summary.json").read_text())
    own = json.loads(run("eval", output, "--json", "--workers", 0).out)
    assert own["top1"] == pytest.approx(summary["top1"]) and own["images"] == 24

    other = table(folder / "other.csv", [row[:2] for row in rows if row[2] == "val"])
    values = json.loads(run("eval", output, "--data", other, "--json", "--workers", 0).out)
    assert values["images"] == 24 and values["top1"] == pytest.approx(own["top1"]), "every row of a list without splits"
    predicted = run("predict", output, other, "--workers", 0)
    files = [row["file"] for row in csv.DictReader(predicted.out.splitlines())]
    assert files == [str(folder / row[0]) for row in rows if row[2] == "val"], "in the order of the rows"
    embedded = run("embed", output, "--data", listed, "--output", tmp_path / "a.safetensors", "--workers", 0)
    assert embedded.code == 0 and "96 embeddings of" in embedded.err
    probed = json.loads(run("eval", output, "--probe", "knn", "--json", "--workers", 0).out)
    assert probed["training_images"] == sum(bool(row[1]) for row in unlabelled if row[2] == "train") < 72

    mixed = run("train", *network, "--data", listed, "--output", tmp_path / "b", *SMALL, "--mixup", 0.2)
    assert mixed.code == 2 and "has training images without a label: --mixup needs every label" in mixed.err
    missing = run("train", *network, "--data", folder / "phots.csv")
    assert missing.code == 2 and f"no data file '{folder / 'phots.csv'}'" in missing.err and "FILE.csv" in missing.err
