"""Tensors with metadata and a checksum, as safetensors written atomically."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from irgdistill.errors import DataError, UserError, one_line
from irgdistill.io.atomic import write_atomically

FORMAT = 2
"""Version of the files that this package writes; it reads those up to it."""


KEY, CHECKSUM = "irgdistill", "checksum"
"""Keys of the metadata and the checksum in a safetensors header."""


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], previous: Path | None = None
) -> None:
    """Write tensors as safetensors, with `metadata` as JSON and a checksum of both in the header. Raises OSError."""
    own = own_copies(tensors)
    header = _header(json.dumps(dict(metadata)), own)

    def write(temporary: Path) -> None:
        try:
            save_file(own, temporary, metadata=header)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None

    write_atomically(path, write, previous)


def own_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU that share no memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _header(text: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {"format": "pt", KEY: text, CHECKSUM: checksum(text, tensors)}


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32, as 8 hex digits, of a text and of every tensor's name, dtype, shape and bytes."""
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Metadata that `save_tensors` wrote; None for other safetensors files. Raises UserError if unreadable."""
    return _read(path, tensors=False)[1]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and metadata (None for other safetensors files). Raises UserError, DataError if damaged."""
    return _read(path, tensors=True)


def map_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """These tensors of a file that `read_tensors` has verified, mapped into memory and not read."""
    with _utf8_name(path) as name, safe_open(name, framework="pt") as file:
        return {key: file.get_tensor(key) for key in names}


def _read(path: Path, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        with _utf8_name(path) as name, safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            values = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is truncated or not a safetensors file: {one_line(error)}") from None
    if KEY not in header:
        return values, None
    try:
        metadata: dict[str, Any] = json.loads(header[KEY])
        newer = metadata["format"] > FORMAT
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path} is damaged: its metadata cannot be read") from None
    if newer:
        raise UserError(
            f"{path} was written by a newer irgdistill (format {metadata['format']}, this one reads {FORMAT})"
        )
    if tensors and header != _header(header[KEY], values):
        raise DataError(f"{path} is damaged: its content does not match its checksum")
    return values, metadata


@contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """A name under which safetensors can open the file: it takes UTF-8 only."""
    if not any("\ud800" <= character <= "\udfff" for character in str(path)):
        yield str(path)
        return
    with open(path, "rb") as file:
        yield f"/dev/fd/{file.fileno()}"
