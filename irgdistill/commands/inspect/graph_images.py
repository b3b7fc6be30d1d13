"""Logs a run: its records, and images of the graphs that both networks make of the same few inputs."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from irgdistill.commands.inspect.measures import LOGITS, Graph, Stage, draw_evenly, graph_of, likeness, look, stages_of
from irgdistill.config import dump
from irgdistill.data import Unlabelled, UnreadableImages, eval_loader
from irgdistill.io import Loggers, Report
from irgdistill.matching import Tapped
from irgdistill.training import Setup

if TYPE_CHECKING:  # it brings matplotlib, which few runs need
    from irgdistill.commands.inspect.figures import Blocks


IMAGES, NEIGHBOURS = 48, 5


class RunLogger:
    """Sends the records of a run, and images of its graphs, to the loggers of `--log`: an `Observer` of a trainer.

    `step`: the update from which records are sent again.
    """

    def __init__(self, setup: Setup, folder: Path, report: Report, step: int) -> None:
        self.setup, self.folder, self.report, self.step = setup, folder, report, step
        self._loggers: Loggers | None = None
        self._snapshots: Snapshots | None = None

    def __enter__(self) -> RunLogger:
        setup, report = self.setup, self.report
        config = setup.config.model_dump(mode="json")
        self._loggers = Loggers(
            setup.config.runtime.loggers,
            self.folder,
            self.step,
            config,
            dump(setup.config),
            report.recorded(),
            report.warn,
        )
        report.listener = self._loggers.record
        return self

    def __exit__(self, *_: object) -> None:
        self.report.listener = None
        if self._loggers is not None:
            self._loggers.close()

    def epoch_ended(self, teacher: Tapped | None, student: Tapped, epoch: int) -> None:
        """Send images of both networks' graphs, every `runtime.graph_images_every` epochs."""
        every = self.setup.config.runtime.graph_images_every
        if teacher is None or not every or epoch % every or not self._loggers:
            return
        try:
            self._snapshots = self._snapshots or Snapshots(self.setup)
            self._loggers.images(self._snapshots.take(teacher, student))
        except Exception as error:
            self.report.warn(f"no images of the graphs after epoch {epoch}: {' '.join(str(error).split())[:200]}")


class Snapshots:
    """`IMAGES` validation images, drawn once and evenly over the classes, and how two networks relate them."""

    def __init__(self, setup: Setup) -> None:
        source, indices, classes = setup.splits.val, setup.splits.val_indices, setup.classes
        if not setup.splits.labelled:
            source, classes = Unlabelled(source, 0), ["unlabelled"]
        labels = source.labels()
        chosen = draw_evenly([labels[i] for i in indices], IMAGES, seed=0)
        self.splits = replace(setup.splits, val=source, val_indices=[indices[i] for i in chosen], classes=classes)
        self.setup = setup

    def take(self, teacher: Tapped, student: Tapped) -> dict[str, NDArray[np.uint8]]:
        """Name of a stage -> picture (H, W, 3): edges of the teacher, of the student, and their difference."""
        from irgdistill.commands.inspect.figures import Blocks

        setup, plan, network = self.setup, self.setup.plan, self.setup.student
        data = setup.config.data.model_copy(update={"workers": 0, "eval_batch_size": IMAGES})
        device, bad = next(student.parameters()).device, UnreadableImages(data.max_bad_images)
        loader = eval_loader(self.splits, data, setup.student.input.covering(setup.crop), device, bad)
        training = student.model.training
        tapped = [
            Tapped(teacher.model, teacher.view, plan.teacher_taps() if plan else ()),
            Tapped(student.model, student.view, plan.student_taps() if plan else ()),
        ]
        try:
            seen = look([each.eval() for each in tapped], loader)
        finally:
            for each in tapped:
                each.release()
            student.model.train(training)
        blocks = Blocks.of(seen.labels.tolist(), self.splits.classes)
        stages = [Stage("logits", LOGITS, LOGITS)]
        if plan is not None:
            stages = stages_of(plan, logits=min(seen.features[0][LOGITS].shape[1], network.num_classes) > 0)
        pictures = {}
        for stage in stages:
            graphs = (
                graph_of(seen.features[0], stage.teacher, stage.teacher_ends),
                graph_of(seen.features[1], stage.student, stage.student_ends),
            )
            name = f"stage {stage.name}" if stage.name.startswith("/") else stage.name
            pictures[name.replace(" /", "-").replace(" ", "-")] = _picture(name, *graphs, blocks)
        return pictures


def _picture(title: str, teacher: Graph, student: Graph, blocks: Blocks) -> NDArray[np.uint8]:
    from irgdistill.commands.inspect.figures import StageView, render, stage_figure

    numbers = likeness(teacher, student, min(NEIGHBOURS, len(teacher.edges) - 1))["edges"]
    caption = f"squared difference {numbers['mse']:.4f}"
    if numbers["pearson"] is not None:
        caption += f"   Pearson {numbers['pearson']:.4f}"
    edges = {"teacher": teacher.edges.numpy(), "student": student.edges.numpy()}
    figure = stage_figure(StageView(title, edges, None, {"student": caption}), blocks)
    return np.asarray(Image.open(io.BytesIO(render(figure, "png"))).convert("RGB"))
