"""`irgdistill export`: writes the trained student in a format that others read.

The export is read back as its users will read it, and its logits are compared with the student's, on validation images
if the data set is available. Only then does it get its final name.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import Tensor

from irgdistill.commands.export.hub import OWN_FILES, WEIGHTS, check_login, save_for_timm, upload
from irgdistill.commands.export.model_card import Provenance, write_card
from irgdistill.commands.export.programs import (
    Logits,
    describe_graph,
    export_program,
    logits_of,
    write_onnx,
    write_program,
)
from irgdistill.commands.requests import ExportRequest
from irgdistill.config import data_of
from irgdistill.data import UnreadableImages, eval_loader, open_splits
from irgdistill.errors import UserError
from irgdistill.io import Report, find_checkpoint, write_atomically, write_folder
from irgdistill.models import CheckpointMetadata, Network, restore

TOLERANCE = 1e-4
"""Largest difference between a logit of the export and of the student."""

ROUNDING = 1e-5
"""The same as a share of the largest logit, where that is more: float32 rounds large numbers more coarsely."""


ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


CHECK_BATCH = 16


GRAPHS = "give --format onnx or program (the weights alone: safetensors.torch.load_file reads the checkpoint)"
"""What a network can be exported as that timm does not make."""


def export(request: ExportRequest) -> Path:
    """Write the student in the requested format and return its path. Raises UserError, leaving everything as it was."""
    _check_requirements(request)
    checkpoint = find_checkpoint(request.target) or Path(request.target)
    network, metadata = _open(checkpoint)
    if request.format in ("hub", "timm") and not network.from_timm:
        raise UserError(f"{network.name} is no network of timm, which --format {request.format} needs: {GRAPHS}")
    path = _free_path(request, network, checkpoint)
    check = _Check(network, *_check_images(request, network, metadata), request.raw_input)
    path.parent.mkdir(parents=True, exist_ok=True)
    if request.format in ("onnx", "program"):
        program = export_program(network, request.raw_input)
        description = describe_graph(network, metadata.classes, request.raw_input)
        if request.format == "onnx":
            write_atomically(path, lambda temporary: check(write_onnx(temporary, program, description, request.opset)))
        else:
            write_atomically(path, lambda temporary: check(write_program(temporary, program, description)))
    elif request.format == "timm":
        write_folder(path, lambda temporary: check(_write_timm(temporary, network, metadata)))
    else:
        write_folder(path, lambda temporary: check(_write_hub(temporary, network, metadata, request, checkpoint)))
    Report().line(f"{path}: {check.result}")
    if request.push is not None:
        Report().line(f"uploaded to {upload(path, request.push, request.overwrite)}")
    return path


# --- before anything is written ---------------------------------------------------------------------------------------


def _check_requirements(request: ExportRequest) -> None:
    """Raises UserError for missing packages or a missing login."""
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if request.format == "onnx" and missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'irgdistill[onnx]'")
    if request.push is not None:
        check_login(request.push)


def _open(checkpoint: Path) -> tuple[Network, CheckpointMetadata]:
    """Raises UserError for weights that irgdistill did not write."""
    if CheckpointMetadata.read(checkpoint) is None:
        raise UserError(f"{checkpoint} was not written by irgdistill; export takes its run folders and checkpoints")
    network, metadata = restore(checkpoint)
    assert metadata is not None
    network.model.eval()
    return network, metadata


def _free_path(request: ExportRequest, network: Network, checkpoint: Path) -> Path:
    """Path of the export. Raises UserError if something is there that must not be replaced."""
    ending = {"onnx": ".onnx", "program": ".pt2"}.get(request.format)
    path = request.output or checkpoint.parent / (request.format if ending is None else network.architecture + ending)
    if ending is not None:
        if path.suffix != ending:
            raise UserError(f"--output {path}: the file of --format {request.format} ends in {ending}")
        if path.is_dir():
            raise UserError(f"--output {path} is a folder")
    elif path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file; --format {request.format} writes a folder")
    if path.exists() and not request.overwrite:
        upload = "" if request.push is None else f", or upload what is there: hf upload {request.push} {path}"
        raise UserError(f"{path} exists; give another --output or --overwrite to replace it{upload}")
    if path.is_dir():
        foreign = sorted({entry.name for entry in path.iterdir()} - {*OWN_FILES, f"{network.architecture}.safetensors"})
        if foreign:
            raise UserError(f"{path} is not replaced: it holds other files ({', '.join(foreign[:3])})")
    return path


# --- checking ---------------------------------------------------------------------------------------------------------


def _check_images(request: ExportRequest, network: Network, metadata: CheckpointMetadata) -> tuple[Tensor, str]:
    """Validation images, uint8 (N, 3, H, W), and their description. Random images if the data set is not available."""
    try:
        data = data_of(request.target, metadata.data, request.data, set(request.given), metadata.plugins)
        data = data.model_copy(update={"download": False})
        bad = UnreadableImages(data.max_bad_images, Report().warn)
        splits = open_splits(data, val_only=True, classes=network.classes or network.num_classes)
        loader = eval_loader(splits, data, network.input, torch.device("cpu"), bad, limit=request.check_images)
        batches, count = [], 0
        for images, _ in loader.epoch():
            batches.append(images[: request.check_images - count])
            count += len(batches[-1])
            if count == request.check_images:
                break
        if not batches:
            raise UserError("no validation image can be read")
        name = Path(str(data.source)).name if Path(str(data.source)).is_dir() else data.source
        return torch.cat(batches), f"{count} validation images of {name}"
    except UserError as error:
        if request.given:
            raise
        Report().warn(f"{error}; checking on random images instead")
        generator = torch.Generator().manual_seed(0)
        shape = (request.check_images, 3, *network.input.size)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), f"{shape[0]} random images"


class _Check:
    """Compares an export with the student. Raises UserError if a logit differs by more than `TOLERANCE` allows."""

    def __init__(self, network: Network, images: Tensor, images_name: str, raw_input: bool) -> None:
        normalised = network.preprocess()(images)
        self.input = images.float() / 255 if raw_input else normalised
        self.expected = _in_batches(logits_of(network.model), normalised)
        self.images_name = images_name
        self.result = ""

    def __call__(self, exported: Logits) -> None:
        difference = float((_in_batches(exported, self.input) - self.expected).abs().max())
        allowed = max(TOLERANCE, ROUNDING * float(self.expected.abs().max()))
        if not difference <= allowed:
            raise UserError(
                f"not exported: on {self.images_name} the logits differ from the student's by up to {difference:.1e}, "
                f"{allowed:.0e} is allowed; nothing was written"
            )
        self.result = f"logits within {difference:.1e} of the student's on {self.images_name}"


@torch.no_grad()
def _in_batches(logits: Logits, images: Tensor) -> Tensor:
    """One image alone, the others in larger batches, to check that the batch size is free."""
    return torch.cat([logits(part) for part in (images[:1], *images[1:].split(CHECK_BATCH)) if len(part)])


# --- folders ----------------------------------------------------------------------------------------------------------


def _write_timm(folder: Path, network: Network, metadata: CheckpointMetadata) -> Logits:
    weights = folder / f"{network.architecture}.safetensors"
    save_for_timm(network, metadata, weights, None)
    name, classes = network.architecture, network.num_classes
    return logits_of(timm.create_model(name, num_classes=classes, checkpoint_path=str(weights), **network.args).eval())


def _write_hub(
    folder: Path, network: Network, metadata: CheckpointMetadata, request: ExportRequest, checkpoint: Path
) -> Logits:
    license = request.license or "apache-2.0"
    save_for_timm(network, metadata, folder / WEIGHTS, license)
    write_card(folder, Provenance(network, metadata, checkpoint), license, request.push)
    return logits_of(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
