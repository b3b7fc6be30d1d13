"""The search for images: endings, hidden files, what is left out, links, special files, its bound."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import SMALL, Run, three_colours

from irgdistill.config import DataConfig
from irgdistill.data import search as search_module
from irgdistill.data.open import open_splits
from irgdistill.data.search import ImageSearch
from irgdistill.data.tar import TarSource
from irgdistill.errors import UserError

NAMES = ("a.png", "b.JPG", "c.jfif", "d.webp", "e.bmp", "f.tif", "g.TIFF", "h.gif", "i.ppm", "j.pgm", "k.Jpeg", "l.jp2")


def write_all(folder: Path) -> None:
    """An image of every ending, beside what is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(NAMES):
        image = Image.fromarray(np.full((4, 4), 10 * i, np.uint8))
        image.save(folder / name, format={".jfif": "JPEG", ".pgm": "PPM"}.get(Path(name).suffix))
    for name in ("x.txt", "y.TXT", "README"):
        (folder / name).write_text("text")
    (folder / "._a.png").write_bytes(b"macOS")
    (folder / ".hidden.png").write_bytes(b"hidden")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "z.png").write_bytes(b"hidden")


def test_every_ending_is_read_and_the_rest_is_counted(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in ("one", "two"):
            write_all(tmp_path / part / label)
    (tmp_path / "train" / "labels.csv").write_text("")
    splits = open_splits(DataConfig(source=str(tmp_path)))
    assert len(splits.train) == len(splits.val) == 2 * len(NAMES)
    means = sorted(round(float(np.asarray(splits.val.load(i)[0]).mean()), -1) for i in range(len(NAMES)))
    assert means == [10 * i for i in range(len(NAMES))], "decoded as what they are"
    assert splits.left_out == "13 files left out: 8 .txt, 4 without ending, 1 .csv"
    assert splits.notes == ["13 files left out: 8 .txt, 4 without ending, 1 .csv"]

    unlabelled = open_splits(DataConfig(source=str(tmp_path / "train"), labels=False, val_fraction=0.5), classes=2)
    assert len(unlabelled.train) == 2 * len(NAMES)
    assert unlabelled.left_out == "7 files left out: 4 .txt, 2 without ending, 1 .csv"

    with tarfile.open(tmp_path / "images.tar", "w") as file:
        file.add(tmp_path / "val", ".")
    search = ImageSearch(100)
    source = TarSource(tmp_path / "images.tar", search)
    assert source.classes == ["one", "two"] and len(source) == 2 * len(NAMES)
    assert str(search) == "6 files left out: 4 .txt, 2 without ending"
    there = {Path(source.describe(i)).parts[-2:]: i for i in range(len(source))}
    for i in range(len(splits.val)):
        image, label = splits.val.load(i)
        other, same = source.load(there[Path(splits.val.describe(i)).parts[-2:]])
        assert label == same and np.array_equal(np.asarray(image), np.asarray(other))


def test_the_commands_name_what_is_left_out_once(run: Run, tmp_path: Path) -> None:
    three_colours(tmp_path)
    (tmp_path / "train" / "red" / "notes.txt").write_text("")
    (tmp_path / "val" / "stray.png").write_bytes(b"")
    student = ("--method", "none", "--student", "cifar_resnet14_x0_5", "--dry-run", *SMALL)
    shown = run("distill", "--data", tmp_path, *student)
    assert shown.code == 0, shown.err
    assert shown.err.count("2 files left out: 1 outside class folders, 1 .txt") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_named_and_never_opened(tmp_path: Path) -> None:
    for label in "ab":
        write_all(tmp_path / label)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b" / "self.png").symlink_to("self.png")
    splits = open_splits(DataConfig(source=str(tmp_path), val_fraction=0.5))
    assert len(splits.train) == 2 * len(NAMES)
    named = (f"{tmp_path}/{name} (no regular file)" for name in ("a/pipe.png", "b/gone.png", "b/self.png"))
    assert splits.left_out == f"9 files left out: 4 .txt, 2 without ending, {', '.join(named)}"
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.add(tmp_path / "a", "a")
    search = ImageSearch(100)
    assert len(TarSource(tmp_path / "a.tar", search)) == len(NAMES)
    assert str(search) == "4 files left out: 2 .txt, 1 without ending, a/pipe.png (no regular file)"


def test_the_order_is_natural_as_before(tmp_path: Path) -> None:
    from timm.data import create_dataset

    for label in ("c2", "c10", "B"):
        (tmp_path / label).mkdir()
        for name in ("10.png", "9.png", "a1.png", "A02.png", "1e3.png"):
            Image.new("L", (2, 2)).save(tmp_path / label / name)
    splits = open_splits(DataConfig(source=str(tmp_path), val_fraction=0.5))
    classes = {name: i for i, name in enumerate(splits.classes)}
    timm = create_dataset("", root=str(tmp_path), search_split=False, class_map=classes).reader.samples
    ours = [(splits.train.describe(i), label) for i, label in enumerate(splits.train.labels())]
    assert ours == timm


@pytest.mark.timeout(20)
def test_links_that_lead_to_one_another_end(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2)).save(tmp_path / name / f"{name}.png")
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    found = list(ImageSearch(100).walk(tmp_path))
    assert sorted(os.path.basename(path) for path in found) == ["a.png", "b.png"], "each once"


def test_the_search_gives_up_and_shows_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(12):
        (tmp_path / f"{i:02d}").mkdir()
        (tmp_path / f"{i:02d}" / "notes.txt").write_text("")
    monkeypatch.setattr(search_module, "REPORT_EVERY", 0.0)
    message = r"looked at 13 files and folders in .* that are no images, and found 0 images: .* data\.search_limit"
    with pytest.raises(UserError, match=message):
        list(ImageSearch(12).walk(tmp_path))
    assert f"looking for images in {tmp_path}: 0 found, " in capsys.readouterr().err
    config = DataConfig(source=str(tmp_path), labels=False, val_fraction=0.5, search_limit=12)
    with pytest.raises(UserError, match="looked at 13 files"):
        open_splits(config, classes=2)
    for i in range(3):  # images earn more
        Image.new("L", (2, 2)).save(tmp_path / "11" / f"{i}.png")
    assert len(open_splits(config, classes=2).train) == 3
