"""Exports the student as a graph for any batch size: a `torch.export` program or an ONNX file."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irgdistill.errors import UserError, one_line
from irgdistill.matching import first_output
from irgdistill.models import Network
from irgdistill.version import __version__

ONNX_BYTES = 2**31
"""Largest size of one ONNX file."""


DYNAMIC = {"images": {0: torch.export.Dim("batch", min=1)}}


Logits = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) as the export takes them -> logits (N, K)."""


def logits_of(model: nn.Module) -> Logits:
    """The network as a function of images."""
    return lambda images: first_output(model(images))


class Student(nn.Module):
    """The module to export: images (N, 3, H, W) -> logits (N, K). With `raw_input` it normalises the images itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, raw_input: bool) -> None:
        super().__init__()
        self.logits = logits_of(network.model)
        self.model = network.model
        self.raw_input = raw_input
        self.register_buffer("mean", torch.tensor(network.input.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(network.input.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits((images - self.mean) / self.std if self.raw_input else images)


def describe_graph(network: Network, classes: list[str], raw_input: bool) -> dict[str, Any]:
    """Format of the graph's input and output: `metadata_props` of an ONNX file, `irgdistill.json` in a program."""
    channels, (height, width) = len(network.input.mean), network.input.size
    scale = "RGB in [0, 1]; normalised inside" if raw_input else "RGB, (value / 255 - mean) / std"
    return {
        "architecture": network.architecture,
        "input": f"images, float32 (N, {channels}, {height}, {width}), {scale}",
        "output": f"logits, float32 (N, {network.num_classes}), in the order of classes"
        if network.num_classes
        else f"embedding, float32 (N, {network.embedding_width()})",
        "classes": classes,
        "input_size": [channels, height, width],
        **network.input.preprocessing,
        "normalised_inside": raw_input,
        "irgdistill": __version__,
    }


def export_program(network: Network, raw_input: bool) -> torch.export.ExportedProgram:
    """Trace the student. Raises UserError if torch.export cannot trace it, or not for any batch size."""
    example = torch.zeros(2, *network.input.shape)
    with _export_errors(network.name), torch.no_grad():
        program = torch.export.export(Student(network, raw_input).eval(), (example,), dynamic_shapes=DYNAMIC)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # full of paths of this machine
    return program


def write_program(path: Path, program: torch.export.ExportedProgram, description: Mapping[str, Any]) -> Logits:
    """Save the program and load it again."""
    with _export_errors(str(description["architecture"])):
        torch.export.save(program, path, extra_files={"irgdistill.json": json.dumps(description, indent=1)})
        loaded: Logits = torch.export.load(path).module()
    return loaded


def write_onnx(
    path: Path, program: torch.export.ExportedProgram, description: Mapping[str, Any], opset: int | None
) -> Logits:
    """Convert, save, and open the file in onnxruntime. Raises UserError if the opset is not available."""
    import onnxruntime

    name = str(description["architecture"])
    if sum(value.numel() * value.element_size() for value in program.state_dict.values()) >= ONNX_BYTES:
        raise UserError(f"{name} is too large for one ONNX file of 2 GB")
    with _export_errors(name):
        exported = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            opset_version=opset,
            dynamic_shapes=DYNAMIC,
            dynamo=True,
            verbose=False,
        )
        assert exported is not None
        got = exported.model.opset_imports[""]
    if opset not in (None, got):
        raise UserError(f"--opset {opset}: {name} is exported in opset {got}; leave --opset out, or give 18 or higher")
    exported.model.metadata_props.update(
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in description.items()}
    )
    with _export_errors(name):
        exported.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@contextmanager
def _export_errors(name: str) -> Iterator[None]:
    """Silence the exporters. Raises UserError with one line if they fail."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:
        why = one_line(error, 200)
        raise UserError(f"{name} cannot be exported as a graph: {why}") from None
    finally:
        logging.disable(before)
