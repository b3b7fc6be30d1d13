"""A folder as users have it: mixed formats, damaged and foreign files, odd names. It trains, and the log says all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import SMALL, Run

CLASSES = ("[red]x[bold]", "a b", "plain")
FORMATS = {"a.JPG": "JPEG", "b.webp": "WEBP", "c.bmp": "BMP", "d.tif": "TIFF", "e.gif": "GIF", "f.ppm": "PPM"}
FORMATS |= {"g.jfif": "JPEG", "[h] 1.png": "PNG"}


def write_messy(root: Path) -> Path:
    """Three classes of eight images, four more in the first, beside whatever else lies around."""
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for file, kind in FORMATS.items():
            pixels = np.random.default_rng(number).integers(0, 90, (20, 16, 3)).astype(np.uint8)
            pixels[..., number] += 150
            Image.fromarray(pixels).save(root / name / file, kind)
    first, exif = root / CLASSES[0], Image.Exif()
    exif[0x0112] = 6
    red = Image.new("RGB", (24, 16), (200, 30, 30))
    red.save(first / "turned.jpg", exif=exif)
    red.convert("CMYK").save(first / "print.jpeg")
    Image.fromarray(np.full((16, 16), 40000, np.uint16)).save(first / "deep.png")
    whole = (first / "turned.jpg").read_bytes()
    (first / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for hidden in ("._turned.jpg", ".hidden.jpg"):
        (first / hidden).write_bytes(whole)
    (first / "notes.txt").write_text("text")
    (root / "stray.jpg").write_bytes(whole)
    (root / "zebra").mkdir()
    (root / ".git").mkdir()
    os.mkfifo(first / "pipe.jpg")
    return root


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.timeout(120)
def test_a_messy_folder_trains_and_the_log_says_what_was_done(run: Run, tmp_path: Path) -> None:
    root = write_messy(tmp_path / "data")
    options = ("--method", "none", "--student", "cifar_resnet14_x0_5", "--epochs", 1, "--val-fraction", 0.25, *SMALL)
    result = run("distill", "--data", root, *options, "--batch-size", 4, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    first = root / CLASSES[0]
    log = result.err.splitlines()
    assert log[:3] == [
        "21 images of 4 classes to train on, 7 for validation",
        f"3 files left out: 1 outside class folders, 1 .txt, {first}/pipe.jpg (no regular file)",
        "class folders without images: zebra in data",
    ]
    (warning,) = (line for line in log if line.startswith("warning: "))
    reason = warning.removeprefix(f"warning: unreadable image skipped (1 of 10 allowed): {first}/cut.jpg ")
    assert "truncated" in reason.lower() and len(reason) < 60
    done = [
        f"{first}/turned.jpg is turned upright by its EXIF orientation, as every such photo (data.exif_orientation)",
        f"{first}/deep.png has 16 bits a channel: such an image is scaled by its depth to 0 to 255",
    ]
    assert all(log.count(line) == 1 for line in done)
    log = [line for line in log if line not in done]
    assert "hidden" not in result.err and "._turned" not in result.err
    assert any(line.startswith("epoch 1/1  top-1 ") for line in log[5:8]), "only a few lines come before it"
    assert json.loads((tmp_path / "run/summary.json").read_text())["bad_images"] == [f"{first}/cut.jpg"]
    predicted = run("predict", tmp_path / "run", root, "--workers", 0)
    assert predicted.code == 0 and "28 of 29 images predicted, 1 unreadable" in predicted.err
    assert len(predicted.out.splitlines()) == 1 + 8 * 3 + 3 + 1, "the header, every image that is read, the stray one"
