"""The decoder: deep pixels, orientation, transparency, animation, formats that are never tried."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile
from support import OLD
from torchvision.datasets import ImageFolder

from irgdistill.config import BEFORE, Config, DataConfig, data_of, load_config, validate_saved
from irgdistill.data.dataset import Images, UnreadableImages
from irgdistill.data.decoding import RESCALED, UnreadableImageError, image_endings, open_image, to_rgb
from irgdistill.data.open import open_splits
from irgdistill.data.timm_dataset import TimmSource
from irgdistill.errors import UserError
from irgdistill.training import with_cached_orientation
from irgdistill.training.cache_manifest import Manifest


def saved(image: Image.Image, name: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, name, **options)
    file.seek(0)
    return file


def grey(file: io.BytesIO) -> list[int]:
    """The pixels of a grey image of one row."""
    pixels = np.asarray(open_image(file))
    assert pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
    return [int(value) for value in pixels[0, :, 0]]


def row(*values: float, dtype: Any) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_by_their_depth(name: str) -> None:
    assert grey(saved(row(0, 257, 32896, 65535, dtype=np.uint16), name)) == [0, 1, 128, 255]


def test_32_bits_are_scaled_by_their_depth() -> None:
    signed = row(-5, 0, 2**30, 2**31 - 1, dtype=np.int32)
    assert grey(saved(signed, "TIFF")) == [0, 0, 128, 255]
    unsigned = Image.fromarray(np.array([[0, 2**31, 2**32 - 1]], dtype=np.uint32).view(np.int32))
    content, tag = saved(unsigned, "TIFF").getvalue(), struct.Struct("<HHIHH")  # Pillow always writes "signed"
    assert content.count(tag.pack(339, 3, 1, 2, 0)) == 1
    assert grey(io.BytesIO(content.replace(tag.pack(339, 3, 1, 2, 0), tag.pack(339, 3, 1, 1, 0)))) == [0, 128, 255]


def test_floats_in_0_to_1_are_scaled_by_255_and_others_by_their_range() -> None:
    assert grey(saved(row(0, 0.2, 0.5, np.nan, dtype=np.float32), "TIFF")) == [0, 51, 128, 0]
    file = saved(row(-1, 0, 1, 3, np.inf, dtype=np.float32), "TIFF")
    assert grey(file) == [0, 64, 128, 255, 255]
    assert open_image(file).info[RESCALED] == "floats from -1 to 3"
    assert grey(saved(row(7, 7, dtype=np.float32), "TIFF")) == [0, 0]


def test_one_warning_names_the_first_image_that_was_scaled_by_its_range() -> None:
    class Floats:
        def __len__(self) -> int:
            return 3

        def load(self, index: int) -> tuple[Image.Image, int]:
            return open_image(saved(row(0, 50, dtype=np.float32), "TIFF")), 0

        def describe(self, index: int) -> str:
            return f"{index}.tif"

        def labels(self) -> list[int]:
            return [0, 0, 0]

    lines: list[str] = []
    unreadable = UnreadableImages(0, lines.append)
    for training in (True, False):  # two data sets, as in two loader processes
        images = Images(Floats(), range(3), lambda image: np.asarray(image), 0, unreadable, training)
        assert [images[i] is not None for i in range(3)] == [True] * 3
    unreadable.collect()
    assert lines == ["0.tif holds floats from 0 to 50: such an image is scaled by its own range to 0 to 255"]
    assert unreadable.names == []


def photo(orientation: int, name: str = "JPEG") -> io.BytesIO:
    """Left half black, right half white, 16×8; stored with an orientation."""
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(Image.fromarray(pixels), name, exif=exif)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_photos_are_turned_upright(name: str) -> None:
    upright = open_image(photo(6, name))
    assert np.array_equal(np.asarray(to_rgb(upright)), np.asarray(upright)), "once, however often it is converted"
    turned = np.asarray(upright)  # stored on its left side: turn clockwise
    assert turned.shape == (16, 8, 3)
    assert turned[:6].mean() < 8 and turned[-6:].mean() > 247
    mirrored = np.asarray(open_image(photo(2, name)))
    assert mirrored.shape == (8, 16, 3) and mirrored[:, :6].mean() > 247
    stored = np.asarray(open_image(photo(6, name), exif_orientation=False))
    assert stored.shape == (8, 16, 3) and stored[:, :6].mean() < 8


def test_the_setting_reaches_every_split(tmp_path: Path) -> None:
    for label in "ab":
        for part in ("train", "val"):
            (tmp_path / part / label).mkdir(parents=True)
            (tmp_path / part / label / "photo.jpg").write_bytes(photo(6).getvalue())
    for upright, size in ((True, (8, 16)), (False, (16, 8))):
        splits = open_splits(DataConfig(source=str(tmp_path), exif_orientation=upright))
        assert splits.train.load(0)[0].size == splits.val.load(1)[0].size == size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_leave_an_image_readable() -> None:
    file = saved(Image.new("RGB", (4, 4), "red"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff")
    assert open_image(file).size == (4, 4)


def test_runs_written_before_the_setting_have_it_off() -> None:
    assert Config().data.exif_orientation and load_config(settings=["seed=1"]).data.exif_orientation
    assert BEFORE == {"data.exif_orientation": False}
    assert validate_saved({"data": {"source": "digits"}}).data.exif_orientation is False
    assert validate_saved({}).data.exif_orientation is False
    assert validate_saved({"data": {"exif_orientation": True}}).data.exif_orientation is True
    assert data_of("run", {"source": "digits"}, DataConfig(), ()).exif_orientation is False


def test_a_cache_decides_for_its_students(tmp_path: Path) -> None:
    old = json.loads((OLD / "cache" / "cache.json").read_text())
    manifest = Manifest.parse(old, tmp_path)
    config = with_cached_orientation(load_config(), manifest, tmp_path)
    assert config.data.exif_orientation is False
    with pytest.raises(UserError, match=r"data\.exif_orientation = True, but the teacher cache .* was made with False"):
        with_cached_orientation(load_config(settings=["data.exif_orientation=true"]), manifest, tmp_path)


def test_transparent_pixels_are_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]
    expected = [[200, 0, 0], [255, 255, 255], [127, 127, 127]]
    for name in ("PNG", "TIFF"):
        assert np.asarray(open_image(saved(Image.fromarray(rgba), name)))[0].tolist() == expected
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 90, 90, 90])
    found = np.asarray(open_image(saved(palette, "PNG", transparency=1)))[0].tolist()
    assert found == [[10, 20, 30], [255, 255, 255]]
    assert grey(saved(Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA"), "PNG")) == [9, 255]


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(name: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black", "red")]
    options = {"lossless": True} if name == "WEBP" else {}
    file = saved(frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(open_image(file)).mean() == 255


def test_grey_and_cmyk_are_converted_as_pillow_does() -> None:
    for mode in ("L", "1", "CMYK"):
        image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).convert(mode)
        file = saved(image, "TIFF")
        assert np.array_equal(np.asarray(open_image(file)), np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize("name", ["EPS", "DDS", "SPIDER", "TGA"])
def test_other_formats_are_never_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(Image.new("F" if name == "SPIDER" else "RGB", (8, 8)), name)
    Image.init()
    _, accept = Image.OPEN[name]

    def trap(*_: object) -> Any:
        raise AssertionError("this decoder ran")

    monkeypatch.setitem(Image.OPEN, name, (trap, accept))
    with pytest.raises(UnreadableImageError, match="its content is in none of the formats"):
        open_image(file)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, RuntimeError, TypeError, KeyError, SyntaxError])
def test_whatever_a_decoder_raises_is_an_unreadable_image(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("a defect")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UnreadableImageError):
        open_image(saved(Image.new("RGB", (4, 4)), "PNG"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        open_image(saved(Image.new("RGB", (4, 4)), "PNG"))


def test_endings_are_those_that_pillow_registers() -> None:
    usual = {
        ".png",
        ".jpg",
        ".jpeg",
        ".jfif",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
        ".avif",
        ".ico",
    }
    assert usual <= image_endings()
    assert not image_endings() & {".eps", ".ps", ".pdf", ".fits", ".dds", ".wmf", ".h5", ".txt", ""}
    assert os.path.splitext("a.JPG")[1].lower() in image_endings()


def test_files_of_torchvision_data_sets_are_read_by_the_same_decoder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    row(0, 257, 65535, dtype=np.uint16).save(tmp_path / "a" / "deep.png")
    (tmp_path / "a" / "photo.jpg").write_bytes(photo(6).getvalue())
    source = TimmSource(ImageFolder(str(tmp_path)))
    assert np.asarray(source.load(0)[0])[0, :, 0].tolist() == [0, 1, 255]
    assert source.load(1)[0].size == (8, 16)
    assert TimmSource(ImageFolder(str(tmp_path)), exif_orientation=False).load(1)[0].size == (16, 8)
