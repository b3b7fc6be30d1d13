"""Class folders that are empty, few, or named by numbers."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from support import SMALL, Run, write_images

from irgdistill.config import DataConfig
from irgdistill.data.open import open_splits
from irgdistill.errors import UserError


def refusal(root: Path, **settings: object) -> str:
    with pytest.raises(UserError) as error:
        open_splits(DataConfig(source=str(root), **settings))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("there", "other"), [("train", "val"), ("val", "train")])
def test_a_class_folder_without_images_is_named_as_empty(tmp_path: Path, there: str, other: str) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part, {"cat": 1, "dog": 1})
    (tmp_path / there / "zebra").mkdir()
    (tmp_path / there / "zebra" / "notes.txt").write_text("")
    message = refusal(tmp_path)
    assert f"differ: zebra in {there} is there and holds no images" in message and "only in" not in message
    write_images(tmp_path / other, {"zebra": 1})
    splits = open_splits(DataConfig(source=str(tmp_path)))
    assert splits.classes == ["cat", "dog", "zebra"]
    assert splits.notes == ["1 file left out: 1 .txt", f"class folders without images: zebra in {there}"]
    seen = open_splits(DataConfig(source=str(tmp_path)), val_only=True).empty
    assert list(seen) == (["zebra in val"] if there == "val" else []), "what is not opened is not judged"


def test_the_same_where_a_part_is_held_out(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": 2, "dog": 2})
    (tmp_path / "train" / "zebra").mkdir()
    for root in (tmp_path, tmp_path / "train"):
        splits = open_splits(DataConfig(source=str(root), val_fraction=0.5))
        assert splits.notes == ["class folders without images: zebra in train"]
        assert len(splits.train_indices) == len(splits.val_indices) == 2


def test_an_empty_folder_of_an_archive_is_named_as_empty(tmp_path: Path) -> None:
    for part, classes in (("train", {"cat": 1, "dog": 1}), ("val", {"cat": 1, "dog": 1, "zebra": 1})):
        write_images(tmp_path / part, classes)
    (tmp_path / "train" / "zebra").mkdir()
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as file:
            file.add(tmp_path / part, ".")
    (tmp_path / "train").rename(tmp_path / "other")
    assert "differ: zebra in train.tar is there and holds no images" in refusal(tmp_path)


def test_one_class_and_one_image_a_class(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": 3})
    (tmp_path / "train" / "zebra").mkdir()
    message = "holds images of one class; expected at least two (without images: zebra)"
    assert message in refusal(tmp_path, val_fraction=0.5)
    write_images(tmp_path / "val", {"cat": 1, "zebra": 1})
    assert message in refusal(tmp_path)
    assert len(open_splits(DataConfig(source=str(tmp_path)), val_only=True).val) == 2, "validation alone is usable"

    write_images(tmp_path / "single", {"a": 1, "b": 1, "c": 1})
    held_out = "of 3 images leaves {} to validate: it is taken of each class, the largest of which holds 1"
    assert held_out.format("3 to train, 0") in refusal(tmp_path / "single", val_fraction=0.1)
    assert held_out.format("0 to train, 3") in refusal(tmp_path / "single", val_fraction=0.9)


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["1", "2", "10"], "the order of the classes is not numeric: 1, 10, 2 (class 1, from 0, is 10)"),
        (
            ["-2", "0", "3", "7", "10", "8"],
            "the order of the classes is not numeric: -2, 0, 10, 3, … (class 2, from 0, is 10)",
        ),
        (["01", "02", "10"], ""),
        (["1", "2", "9"], ""),
        (["1", "10", "2", "x"], ""),
    ],
)
def test_an_order_that_is_not_numeric_is_told(tmp_path: Path, names: list[str], note: str) -> None:
    write_images(tmp_path, dict.fromkeys(names, 2), size=2)
    splits = open_splits(DataConfig(source=str(tmp_path), val_fraction=0.5))
    assert splits.classes == sorted(names), "the order itself stays"
    assert splits.notes == [note] * bool(note)


def test_the_log_says_both_in_one_line_each(run: Run, tmp_path: Path) -> None:
    write_images(tmp_path, {"1": 16, "2": 16, "10": 16})
    (tmp_path / "3").mkdir()
    student = ("--method", "none", "--student", "cifar_resnet14_x0_5", "--dry-run", *SMALL)
    shown = run("distill", "--data", tmp_path, "--val-fraction", 0.25, *student)
    assert shown.code == 0, shown.err
    assert shown.err.count("the order of the classes is not numeric: 1, 10, 2, 3 (class 1, from 0, is 10)\n") == 1
    assert shown.err.count(f"class folders without images: 3 in {tmp_path.name}\n") == 1
