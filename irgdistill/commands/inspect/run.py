"""`inspect-graph`: the plan, the graphs of N images, the files that show them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from rich.console import Console
from torch import Tensor

from irgdistill.commands.inspect.figures import (
    Blocks,
    StageView,
    overview_figure,
    render,
    stage_figure,
    transformation_figure,
)
from irgdistill.commands.inspect.measures import (
    Graph,
    Seen,
    Stage,
    graph_of,
    likeness,
    look,
    nearest_neighbours,
    stages_of,
)
from irgdistill.commands.inspect.networks import Meeting, Member, image_name, known_networks, meet, show_plan
from irgdistill.commands.inspect.page import build_page
from irgdistill.commands.inspect.terminal import show
from irgdistill.commands.requests import InspectRequest
from irgdistill.config import Config
from irgdistill.data import UnreadableImages, eval_loader
from irgdistill.errors import UserError
from irgdistill.io import Report, table, write_atomically, write_text
from irgdistill.matching import Tapped, print_plan
from irgdistill.models import parameters
from irgdistill.runtime import choose_device
from irgdistill.version import __version__

FORMAT = 1


KIND = "irgdistill graph"


REMEMBERED = {"source", "root", "train_split", "val_split", "val_fraction", "eval_batch_size"}
"""Of the data's configuration: what the numbers depend on."""


def inspect(request: InspectRequest) -> None:
    """The command. Raises UserError."""
    if request.plan_only:
        show_plan(request)
        return
    config = known_networks(request)
    output = request.output
    if output is not None:
        _check_output(output)
    meeting = meet(request, config)
    if output is None:
        output = _default_output(request, meeting)
        _check_output(output)
    Inspection(meeting, request, config, output).run()


class Inspection:
    """One inspection: look, compute, draw, write, print."""

    def __init__(self, meeting: Meeting, request: InspectRequest, config: Config, output: Path) -> None:
        self.meeting, self.request, self.config, self.output = meeting, request, config, output
        self.members = [meeting.teacher, *meeting.students]
        self.report = Report()

    def run(self) -> None:
        """Everything is made in memory first, so that a failure leaves no half of it."""
        self.report.line("\n".join(f"{member.label}: {member.weights}" for member in self.members))
        if not self.request.as_json:
            print_plan(self.meeting.plan, stdout=True)
        seen, names = self._look()
        self._graph(seen)
        facts = self._facts(seen, names)
        files = self._draw(facts, seen)
        files["graph.safetensors"] = safetensors.torch.save(self._tensors(seen), {"kind": KIND})
        facts["files"] = sorted([*files, "graph.json"])
        self._write(facts, files)
        self._tell(facts)

    def _look(self) -> tuple[Seen, list[str]]:
        """Run the networks over the images that were drawn -> what they saw, and the images' names."""
        meeting, device = self.meeting, choose_device(self.config.runtime.device)
        teacher, student = self.members[0].network, self.members[1].network
        wanted = len(meeting.splits.val_indices)
        if wanted < self.request.images:
            self.report.warn(f"only {wanted} images in the {self.request.split} split of {meeting.data.source}")
        self.bad = UnreadableImages(meeting.data.max_bad_images, self.report.warn)
        crop = student.input.covering(teacher.input)
        loader = eval_loader(meeting.splits, meeting.data, crop, device, self.bad)
        plan = meeting.plan
        networks = []
        for number, member in enumerate(self.members):
            taps = plan.student_taps() if number else plan.teacher_taps()
            view = member.network.view().to(device)
            networks.append(Tapped(member.network.model.to(device), view, taps).eval())
        seen = look(networks, loader)
        source = meeting.splits.val
        kept = [i for i in meeting.splits.val_indices if source.describe(i) not in self.bad.names]
        assert len(kept) == len(seen.labels)
        if len(kept) <= self.request.neighbours:
            raise UserError(f"--neighbours {self.request.neighbours}: only {len(kept)} images could be read")
        return seen, [image_name(source, i, meeting.data) for i in kept]

    def _graph(self, seen: Seen) -> None:
        """Graphs and numbers of every stage."""
        logits = all(member.network.num_classes > 0 for member in self.members)
        self.stages = stages_of(self.meeting.plan, logits)
        self.graphs: list[dict[str, Graph]] = []
        self.numbers: list[dict[str, Any]] = []
        for stage in self.stages:
            graphs = {}
            for number, (member, features) in enumerate(zip(self.members, seen.features, strict=True)):
                tap, ends = (stage.student, stage.student_ends) if number else (stage.teacher, stage.teacher_ends)
                graphs[member.label] = graph_of(features, tap, ends)
            teacher, *students = graphs.items()
            self.graphs.append(graphs)
            self.numbers.append(
                {name: likeness(teacher[1], graph, self.request.neighbours) for name, graph in students}
            )

    def _facts(self, seen: Seen, names: list[str]) -> dict[str, Any]:
        """What graph.json holds."""
        meeting = self.meeting
        labels = seen.labels.tolist()
        return {
            "format": FORMAT,
            "kind": KIND,
            "teacher": _member(meeting.teacher),
            "students": [_member(student) for student in meeting.students],
            "data": {"split": self.request.split, **meeting.data.model_dump(mode="json", include=REMEMBERED)},
            "seed": self.config.seed,
            "neighbours": self.request.neighbours,
            "classes": meeting.splits.classes,
            "images": [{"name": name, "label": label} for name, label in zip(names, labels, strict=True)],
            "unreadable": sorted(self.bad.names),
            "stages": [_stage(stage, numbers) for stage, numbers in zip(self.stages, self.numbers, strict=True)],
            "plan": meeting.plan.to_dict(),
            "versions": {
                "irgdistill": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
        }

    def _draw(self, facts: Mapping[str, Any], seen: Seen) -> dict[str, bytes]:
        """Name -> content of every figure and of the report."""
        form, classes = self.request.format, self.meeting.splits.classes
        blocks = Blocks.of(seen.labels.tolist(), classes)
        self.views = [
            _view(stage, graphs, numbers, self.request.neighbours)
            for stage, graphs, numbers in zip(self.stages, self.graphs, self.numbers, strict=True)
        ]
        files = {}
        for number, (stage, view) in enumerate(zip(self.stages, self.views, strict=True), 1):
            name = "edges-logits" if stage.name == "logits" else f"edges-stage-{number}"
            files[f"{name}.{form}"] = render(stage_figure(view, blocks), form)
        moving = transformation_figure(self.views, blocks)
        if moving is not None:
            files[f"transformations.{form}"] = render(moving, form)
        labels = [member.label for member in self.members]
        title = f"{labels[0]} → {', '.join(labels[1:])}: {blocks.count} images of {facts['data']['source']}"
        page = render(overview_figure(title, self.views, blocks), "png")
        files[f"overview.{form}"] = page if form == "png" else render(overview_figure(title, self.views, blocks), form)
        near = [
            {name: nearest_neighbours(graph.edges, self.request.neighbours).numpy() for name, graph in graphs.items()}
            for graphs in self.graphs
        ]
        thumbnails = [pixels.permute(1, 2, 0).numpy() for pixels in seen.thumbnails]
        files["report.html"] = build_page(facts, self.views, near, thumbnails, page).encode()
        return files

    def _write(self, facts: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """graph.json first: it lists what is ours."""
        self.output.mkdir(parents=True, exist_ok=True)
        own = _own_files(self.output)
        for name in facts["files"]:
            if name not in own and (self.output / name).exists():
                raise UserError(f"{self.output / name} was not written by inspect-graph; give another --output")
        for name in own - set(facts["files"]):
            (self.output / name).unlink(missing_ok=True)
        write_text(self.output / "graph.json", json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        for name, content in files.items():
            write_atomically(self.output / name, partial(_fill, content))

    def _tensors(self, seen: Seen) -> dict[str, Tensor]:
        """Keys: labels; edges.STAGE.ROLE and transformation.STAGE.ROLE, stages numbered from 1, roles in order."""
        roles = ["teacher", "student", "compare"]
        tensors = {"labels": seen.labels}
        for number, (stage, graphs) in enumerate(zip(self.stages, self.graphs, strict=True), 1):
            key = "logits" if stage.name == "logits" else str(number)
            for role, graph in zip(roles, graphs.values(), strict=False):
                tensors[f"edges.{key}.{role}"] = graph.edges
                if graph.moved is not None:
                    tensors[f"transformation.{key}.{role}"] = graph.moved
        return tensors

    def _tell(self, facts: Mapping[str, Any]) -> None:
        if self.request.as_json:
            keys = ("teacher", "students", "data", "seed", "neighbours", "unreadable", "stages", "files")
            values = {key: facts[key] for key in keys} | {"images": len(facts["images"]), "output": str(self.output)}
            print(json.dumps(values, indent=2, ensure_ascii=False))  # noqa: T201  the command's result
        else:
            _print_numbers(facts)
        if self.request.terminal:
            show(Console(stderr=self.request.as_json), self.views)
        self.report.line(f"report and figures: {self.output / 'report.html'}")


def _fill(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _member(member: Member) -> dict[str, Any]:
    network = member.network
    return {
        "label": member.label,
        "architecture": network.architecture,
        "weights": member.weights,
        "parameters": parameters(network.model),
        "num_classes": network.num_classes,
        "input_size": list(network.input.size),
        "mean": list(network.input.mean),
        "std": list(network.input.std),
    }


def _stage(stage: Stage, numbers: Mapping[str, Any]) -> dict[str, Any]:
    last = {role: None if stage.name == "logits" else getattr(stage, role) for role in ("teacher", "student")}
    ends = {"teacher_ends": stage.teacher_ends, "student_ends": stage.student_ends}
    return {"name": stage.name, **last, **ends, "numbers": dict(numbers)}


def _view(stage: Stage, graphs: Mapping[str, Graph], numbers: Mapping[str, Any], neighbours: int) -> StageView:
    moved = {name: graph.moved.numpy() for name, graph in graphs.items() if graph.moved is not None}
    captions = {}
    for name, value in numbers.items():
        edges = value["edges"]
        captions[name] = "   ".join(
            f"{title} {_number(edges[key])}"
            for title, key in (
                ("squared difference", "mse"),
                ("Pearson", "pearson"),
                ("Spearman", "spearman"),
                (f"neighbours@{neighbours}", "neighbours"),
                ("CKA", "cka"),
            )
        )
    title = f"stage {stage.name}" if stage.name.startswith("/") else stage.name
    edges = {name: graph.edges.numpy() for name, graph in graphs.items()}
    return StageView(title, edges, moved if len(moved) == len(graphs) else None, captions)


def _print_numbers(facts: Mapping[str, Any]) -> None:
    several = len(facts["students"]) > 1
    columns = ["stage", *(["student"] if several else []), "edges", "r", "ρ", f"near@{facts['neighbours']}", "CKA"]
    columns += ["moves", "r"]
    rows = []
    for stage in facts["stages"]:
        for name, numbers in stage["numbers"].items():
            edges, moved = numbers["edges"], numbers["transformation"] or {}
            values = [edges[key] for key in ("mse", "pearson", "spearman", "neighbours", "cka")]
            values += [moved.get("mse"), moved.get("pearson")]
            rows.append([stage["name"], *([name] if several else []), *map(_number, values)])
    table(f"{len(facts['images'])} images of {facts['data']['source']}, seed {facts['seed']}", columns, rows)
    legend = (
        "edges, moves: mean squared difference, as in the loss; r Pearson, ρ Spearman over pairs (of moves: images)"
    )
    Report(stdout=True).line(f"  {legend}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _default_output(request: InspectRequest, meeting: Meeting) -> Path:
    if request.target is not None and Path(request.target).is_dir():
        return Path(request.target) / "graphs"
    name = f"{meeting.teacher.network.architecture}-{meeting.students[0].network.architecture}"
    return Path("graphs") / name


def _check_output(output: Path) -> None:
    """Raises UserError where nothing can be written, before anything is computed."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output {output}: {there} is {'not writable' if there.is_dir() else 'a file'}")


def _own_files(output: Path) -> set[str]:
    """What an earlier inspection wrote here, as its graph.json says."""
    try:
        facts = json.loads((output / "graph.json").read_text(encoding="utf-8"))
        names: Sequence[str] = facts["files"] if facts["kind"] == KIND else []
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in names if Path(name).name == name}
