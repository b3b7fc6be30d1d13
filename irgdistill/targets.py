"""What a command is pointed at: a checkpoint, a run folder or a network's name, and the data set it remembers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from irgdistill.checkpoint import restore
from irgdistill.errors import UserError
from irgdistill.models import Network, build_network
from irgdistill.report import Report
from irgdistill.run_folder import RunFolder, find_checkpoint
from irgdistill.settings import DataConfig


def open_network(target: str, checkpoint: Path | None, size: tuple[int, int] | None) -> tuple[Network, dict[str, Any]]:
    """Checkpoint, run folder or timm name (pretrained, or with `checkpoint`) -> network and metadata ({} if none)."""
    path = find_checkpoint(target)
    if path is not None:
        if checkpoint is not None:
            raise UserError(f"{target} is a checkpoint itself; leave out the second one, {checkpoint}")
        if Path(target).is_dir() and path == RunFolder(Path(target)).last:
            Report().warn(f"{target} holds no best.safetensors; taking last.safetensors")
        return restore(path, None, size)
    if checkpoint is not None:
        return restore(checkpoint, target, size)
    return build_network(target, pretrained=True, input_size=size), {}


def data_of(target: str, metadata: Mapping[str, Any], asked: DataConfig, given: Collection[str]) -> DataConfig:
    """The remembered data set, with what was asked for now on top.

    Raises UserError: none is remembered or it is gone, or a part to hold out of images that were trained on.
    """
    if "data" not in metadata:
        if asked.source is None:
            raise UserError(f"{target} does not remember a data set; give --data")
        return asked
    remembered = DataConfig.model_validate(metadata["data"])
    if "data.val_fraction" in given and "data.source" not in given and asked.val_fraction != remembered.val_fraction:
        raise UserError(f"{target} is judged on what its run held out; --val-fraction goes with other --data")
    names = {key.removeprefix("data.") for key in given if key.startswith("data.")}
    names |= {"eval_batch_size", "workers"}
    data = remembered.model_copy(update={name: getattr(asked, name) for name in names})
    if data.source and "/" in data.source and Path(data.source).is_absolute() and not Path(data.source).exists():
        raise UserError(f"the data set of {target} is no longer at {data.source}; say where it is with --data")
    return data
