"""`irgdistill embed`: the embedding of every image, with its name, as safetensors or Parquet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from irgdistill.commands.image_requests import EmbedRequest
from irgdistill.config import DataConfig, find_source
from irgdistill.data import ImageFiles, ImageSearch, OnePass, Source, open_splits
from irgdistill.errors import UserError
from irgdistill.io import FORMAT, Report, save_tensors, write_atomically
from irgdistill.models import CheckpointMetadata, describe, open_network
from irgdistill.runtime import choose_device, keep_memory
from irgdistill.training import embed as embeddings_of


def embed(request: EmbedRequest) -> None:
    """Embed every image that can be read. Raises UserError: nothing to read, a network without such an embedding."""
    config, report = request.config, Report()
    network, metadata = open_network(request.target, request.checkpoint, config.student.input_size)
    network.pooling = config.teacher.pooling
    device = choose_device(config.runtime.device)
    keep_memory(device)
    limit = config.data.max_bad_images if "data.max_bad_images" in request.given else None
    data = config.data.replaced({"exif_orientation": upright(metadata)})
    parts = [
        OnePass(source, data, network.input, device, report.warn, limit=limit) for source in _sources(data, report)
    ]
    found, names = list[Tensor](), list[str]()
    for images in parts:
        embeddings, positions = embeddings_of(network, images, config.runtime.amp, report)
        found.append(embeddings)
        names += [images.name(position) for position in positions.tolist()]
    whole = found[0] if len(found) == 1 else torch.cat(found)
    if request.parquet:
        write_atomically(request.output, lambda path: _write_parquet(path, whole, names))
    else:
        facts = {"format": FORMAT, "network": describe(network, network.classes or []), "data": data.source}
        save_tensors(request.output, {"embeddings": whole, **_packed(names)}, facts)
    unreadable = sum(images.unreadable for images in parts)
    report.line(
        f"{len(names):,} embeddings of {whole.shape[1]:,} numbers in {request.output}, {unreadable:,} images unreadable"
    )


def upright(metadata: CheckpointMetadata | None) -> bool:
    """Whether photos are turned upright: as in the run that wrote the checkpoint."""
    recorded = None if metadata is None else metadata.data
    return recorded is None or bool(recorded.get("exif_orientation", False))


def _sources(data: DataConfig, report: Report) -> list[Source]:
    """All images: of a folder at any depth, ordered by path; of a list; else for training, then for validation."""
    root, entry = Path(str(data.source)), find_source(str(data.source))
    if entry.paths is not None:
        return [ImageFiles(entry.paths(data), data.exif_orientation)]
    if root.is_dir():
        search = ImageSearch(data.search_limit)
        paths = sorted(search.walk(root))
        if not paths:
            raise UserError(f"no images in {root}")
        if str(search):
            report.line(str(search))
        return [ImageFiles(paths, data.exif_orientation)]
    share = 0.5 if data.val_fraction is None else data.val_fraction  # where one is needed; both parts are embedded
    splits = open_splits(data.replaced({"val_fraction": share}))
    if splits.streaming:
        raise UserError(f"{data.source} is a stream, whose images have no names")
    return [splits.train] if splits.train is splits.val else [splits.train, splits.val]


# --- names ------------------------------------------------------------------------------------------------------------


def _packed(names: Sequence[str]) -> dict[str, Tensor]:
    """The bytes of all names one after another, uint8, and where each begins and the last ends, int64 (N + 1,)."""
    encoded = [os.fsencode(name) for name in names]
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {"names": torch.from_numpy(joined), "name_offsets": torch.from_numpy(ends)}


def _write_parquet(path: Path, embeddings: Tensor, names: Sequence[str]) -> None:
    """Columns `file` (text; bytes if a name is not UTF-8) and `embedding` (a list of D float32)."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        files = pa.array(names, pa.string())
    except UnicodeEncodeError:
        files = pa.array([os.fsencode(name) for name in names], pa.binary())
    values = pa.array(embeddings.flatten().numpy())
    table = pa.table({"file": files, "embedding": pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])})
    parquet.write_table(table, path)
