"""Files of an inspection: graph.json, the matrices, the figures and the report."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor

from irgdistill.commands.inspect.figures import (
    Blocks,
    StageView,
    overview_figure,
    render,
    stage_figure,
    transformation_figure,
)
from irgdistill.commands.inspect.measures import Features, Stage, StageComparison
from irgdistill.commands.inspect.networks import Inspection, NetworkUnderTest
from irgdistill.commands.inspect.page import build_page
from irgdistill.commands.requests import InspectRequest
from irgdistill.errors import UserError
from irgdistill.io import write_atomically, write_text
from irgdistill.models import parameters
from irgdistill.training import nearest_neighbours
from irgdistill.version import __version__

FORMAT = 1


KIND = "irgdistill graph"


RECORDED = {"source", "root", "train_split", "val_split", "val_fraction", "eval_batch_size"}
"""Settings of the section `data` on which the numbers depend."""


class Results:
    """The results of an inspection, made in memory and then written to a folder."""

    def __init__(
        self,
        inspection: Inspection,
        request: InspectRequest,
        seed: int,
        features: Features,
        compared: Sequence[StageComparison],
    ) -> None:
        self.inspection, self.request, self.seed = inspection, request, seed
        self.features, self.compared = features, compared

    @cached_property
    def views(self) -> list[StageView]:
        """The stages as plain arrays for drawing."""
        return [_view(compared, self.request.neighbours) for compared in self.compared]

    def write(self, output: Path, names: list[str], unreadable: list[str]) -> dict[str, Any]:
        """Write all files into `output` and return the content of graph.json. Raises UserError for files of others.

        `names` and `unreadable` are names of images. graph.json is written first: it lists the files to replace later.
        """
        facts = self._facts(names, unreadable)
        files = self._draw(facts)
        files["graph.safetensors"] = safetensors.torch.save(self._tensors(), {"kind": KIND})
        facts["files"] = sorted([*files, "graph.json"])
        output.mkdir(parents=True, exist_ok=True)
        own = _own_files(output)
        for name in facts["files"]:
            if name not in own and (output / name).exists():
                raise UserError(f"{output / name} was not written by inspect-graph; give another --output")
        for name in own - set(facts["files"]):
            (output / name).unlink(missing_ok=True)
        write_text(output / "graph.json", json.dumps(facts, indent=1, allow_nan=False) + "\n")
        for name, content in files.items():
            write_atomically(output / name, partial(_write_bytes, content))
        return facts

    def _facts(self, names: list[str], unreadable: list[str]) -> dict[str, Any]:
        """Content of graph.json."""
        inspection, labels = self.inspection, self.features.labels.tolist()
        return {
            "format": FORMAT,
            "kind": KIND,
            "teacher": _network_facts(inspection.teacher),
            "students": [_network_facts(student) for student in inspection.students],
            "data": {"split": self.request.split, **inspection.data.model_dump(mode="json", include=RECORDED)},
            "seed": self.seed,
            "neighbours": self.request.neighbours,
            "classes": inspection.splits.classes,
            "images": [{"name": name, "label": label} for name, label in zip(names, labels, strict=True)],
            "unreadable": unreadable,
            "stages": [_stage_facts(compared.stage, compared.similarities) for compared in self.compared],
            "plan": inspection.plan.to_dict(),
            "versions": {
                "irgdistill": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
        }

    def _draw(self, facts: Mapping[str, Any]) -> dict[str, bytes]:
        """Name -> content of every figure and of the report."""
        form, views = self.request.format, self.views
        blocks = Blocks.of(self.features.labels.tolist(), self.inspection.splits.classes)
        files = {}
        for number, (compared, view) in enumerate(zip(self.compared, views, strict=True), 1):
            name = "edges-logits" if compared.stage.name == "logits" else f"edges-stage-{number}"
            files[f"{name}.{form}"] = render(stage_figure(view, blocks), form)
        transformations = transformation_figure(views, blocks)
        if transformations is not None:
            files[f"transformations.{form}"] = render(transformations, form)
        teacher, *students = (network.label for network in self.inspection.networks)
        title = f"{teacher} → {', '.join(students)}: {blocks.count} images of {facts['data']['source']}"
        overview = render(overview_figure(title, views, blocks), "png")
        files[f"overview.{form}"] = overview
        if form != "png":
            files[f"overview.{form}"] = render(overview_figure(title, views, blocks), form)
        nearest = [
            {
                name: nearest_neighbours(graph.edges, self.request.neighbours).numpy()
                for name, graph in compared.graphs.items()
            }
            for compared in self.compared
        ]
        thumbnails = [pixels.permute(1, 2, 0).numpy() for pixels in self.features.thumbnails]
        files["report.html"] = build_page(facts, views, nearest, thumbnails, overview).encode()
        return files

    def _tensors(self) -> dict[str, Tensor]:
        """Keys: labels; edges.STAGE.ROLE and transformation.STAGE.ROLE, with stages numbered from 1."""
        roles = ("teacher", "student", "compare")
        tensors = {"labels": self.features.labels}
        for number, compared in enumerate(self.compared, 1):
            key = "logits" if compared.stage.name == "logits" else str(number)
            for role, graph in zip(roles, compared.graphs.values(), strict=False):
                tensors[f"edges.{key}.{role}"] = graph.edges
                if graph.moved is not None:
                    tensors[f"transformation.{key}.{role}"] = graph.moved
        return tensors


def format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _network_facts(tested: NetworkUnderTest) -> dict[str, Any]:
    network = tested.network
    return {
        "label": tested.label,
        "architecture": network.architecture,
        "weights": tested.weights,
        "parameters": parameters(network.model),
        "num_classes": network.num_classes,
        "input_size": list(network.input.size),
        "mean": list(network.input.mean),
        "std": list(network.input.std),
    }


def _stage_facts(stage: Stage, numbers: Mapping[str, Any]) -> dict[str, Any]:
    last = {role: None if stage.name == "logits" else getattr(stage, role) for role in ("teacher", "student")}
    ends = {"teacher_ends": stage.teacher_ends, "student_ends": stage.student_ends}
    return {"name": stage.name, **last, **ends, "numbers": dict(numbers)}


def _view(compared: StageComparison, neighbours: int) -> StageView:
    graphs = compared.graphs
    moved = {name: graph.moved.numpy() for name, graph in graphs.items() if graph.moved is not None}
    captions = {}
    for name, value in compared.similarities.items():
        captions[name] = "   ".join(
            f"{title} {format_number(value['edges'][key])}"
            for title, key in (
                ("squared difference", "mse"),
                ("Pearson", "pearson"),
                ("Spearman", "spearman"),
                (f"neighbours@{neighbours}", "neighbours"),
                ("CKA", "cka"),
            )
        )
    edges = {name: graph.edges.numpy() for name, graph in graphs.items()}
    return StageView(compared.stage.title, edges, moved if len(moved) == len(graphs) else None, captions)


def _own_files(output: Path) -> set[str]:
    """Files that an earlier inspection wrote here, as its graph.json lists them."""
    try:
        facts = json.loads((output / "graph.json").read_text(encoding="utf-8"))
        names: Sequence[str] = facts["files"] if facts["kind"] == KIND else []
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in names if Path(name).name == name}
