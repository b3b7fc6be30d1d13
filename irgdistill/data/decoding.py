"""The one decoder of image files: which formats are read, and how their pixels become 8-bit RGB."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any

from PIL import UnidentifiedImageError

from irgdistill.errors import one_line
from irgdistill.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
else:
    Image = lazy("PIL.Image")
    np = lazy("numpy")

FORMATS = (*("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "AVIF", "HEIF"),)
"""Formats of photos and figures, by their names in Pillow. The content chooses the decoder, so no others are tried:
some start programs, such as Ghostscript for EPS, or fail in ways of their own."""


PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_avif": ""}
"""Packages that add a format to Pillow, if installed, and the function that does it; empty: the import does."""


RESCALED = "irgdistill rescaled"
"""Key of `Image.info` that describes pixels without a natural scale, which were scaled by their range."""


DEEP, TURNED = "irgdistill deep", "irgdistill turned"
"""Keys of `Image.info` for what was done to an image without loss: it was scaled by its depth, or turned upright."""


BITS, SAMPLE_FORMAT, SIGNED, ORIENTATION = 258, 339, 2, 0x0112
"""Tags of TIFF and EXIF, and the sample format of signed integers."""


class UnreadableImageError(OSError):
    """An image that no decoder reads."""


@cache
def _formats() -> list[str]:
    """The formats that this Pillow reads."""
    for package, function in PLUGINS.items():
        if find_spec(package) is not None:
            module = import_module(package)
            if function:
                getattr(module, function)()
    warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # such an image is read as it was stored
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@cache
def image_endings() -> frozenset[str]:
    """Endings of file names in lower case, such as `.png`, that Pillow registers for the formats."""
    readable = {*_formats(), "MPO"}  # an MPO is opened as a JPEG
    return frozenset(ending.lower() for ending, name in Image.EXTENSION.items() if name in readable)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image. Hidden files are not, such as the `._x.jpg` of macOS."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_endings()


def open_image(file: str | os.PathLike[str] | IO[bytes], exif_orientation: bool = True) -> Image.Image:
    """Read the first frame as 8-bit RGB. Raises UnreadableImageError for whatever a decoder raises but MemoryError."""
    try:
        with Image.open(file, formats=_formats()) as image:
            return to_rgb(image, exif_orientation)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError("its content is in none of the formats that are read") from None
    except Exception as error:
        raise UnreadableImageError(one_line(error)) from error


def to_rgb(image: Image.Image, exif_orientation: bool = True) -> Image.Image:
    """Convert any mode to 8-bit RGB: deep pixels by their depth, transparent ones on white, turned as EXIF says."""
    image.load()
    if image.mode[0] in "IF":
        rgb = _from_deep(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        rgb = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    else:
        rgb = image.convert("RGB")
    rgb.info = {key: value for key, value in rgb.info.items() if key in (RESCALED, DEEP)}  # again, nothing changes
    turn = _turn(image) if exif_orientation else None
    if turn is None:
        return rgb
    turned = rgb.transpose(turn)
    turned.info = rgb.info | {TURNED: "its EXIF orientation"}
    return turned


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright. Pillow itself turns a TIFF when it is loaded, and pillow-heif a HEIF."""
    turns = Image.Transpose
    by_orientation = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    try:
        return by_orientation.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data leave the pixels readable
        return None


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey pixels of more than 8 bits, integers or floats, to 8-bit RGB."""
    values = np.asarray(image)
    if image.mode == "F":
        share, done = _share_of_range(values.astype(np.float64))
    else:
        tags: Any = getattr(image, "tag_v2", {})
        bits, signed = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
        if bits == 32 and not signed:
            values = values.view(np.uint32)  # Pillow keeps them as signed integers
        share, done = values / (2.0 ** (bits - signed) - 1), f"{bits} bits"
    grey = np.rint(255 * np.clip(share, 0, 1)).astype(np.uint8)
    rgb = Image.fromarray(grey).convert("RGB")
    if done:
        rgb.info[RESCALED if image.mode == "F" else DEEP] = done
    return rgb


def _share_of_range(values: Any) -> tuple[Any, str]:
    """Floats as shares of 1, and how they were scaled: not at all in [0, 1], else by the range of the finite ones."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    note = ""
    if low < 0 or high > 1:
        values, note = (values - low) / ((high - low) or 1), f"floats from {low:.4g} to {high:.4g}"
    return np.nan_to_num(values, nan=0, posinf=1, neginf=0), note
