"""Logs a run: its records, and images of the graphs that both networks make of the same few inputs."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from irgdistill.commands.inspect.measures import (
    LOGITS,
    Stage,
    StageComparison,
    collect_features,
    compare_graphs,
    draw_evenly,
    stages_of,
)
from irgdistill.config import dump
from irgdistill.data import Unlabelled, UnreadableImages, eval_loader
from irgdistill.errors import one_line
from irgdistill.io import Loggers, Report
from irgdistill.matching import Tapped
from irgdistill.training import Setup

if TYPE_CHECKING:  # imports matplotlib, which few runs need
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
            self._loggers.images(self._snapshots.draw(teacher, student))
        except Exception as error:
            self.report.warn(f"no images of the graphs after epoch {epoch}: {one_line(error, 200)}")


class Snapshots:
    """Draws graphs of the same `IMAGES` validation images, chosen evenly from the classes."""

    def __init__(self, setup: Setup) -> None:
        source, indices, classes = setup.splits.val, setup.splits.val_indices, setup.classes
        if not setup.splits.labelled:
            source, classes = Unlabelled(source, 0), ["unlabelled"]
        labels = source.labels()
        chosen = draw_evenly([labels[i] for i in indices], IMAGES, seed=0)
        self.splits = replace(setup.splits, val=source, val_indices=[indices[i] for i in chosen], classes=classes)
        self.setup = setup

    def draw(self, teacher: Tapped, student: Tapped) -> dict[str, NDArray[np.uint8]]:
        """Name of a stage -> image (H, W, 3): edges of the teacher, of the student, and their difference."""
        from irgdistill.commands.inspect.figures import Blocks

        setup, plan, network = self.setup, self.setup.plan, self.setup.student
        data = setup.config.data.model_copy(update={"workers": 0, "eval_batch_size": IMAGES})
        device, bad = next(student.parameters()).device, UnreadableImages(data.max_bad_images)
        loader = eval_loader(self.splits, data, setup.student.input.covering(setup.crop), device, bad)
        training = student.model.training
        networks = [
            Tapped(teacher.model, teacher.preprocess, plan.teacher_taps() if plan else ()),
            Tapped(student.model, student.preprocess, plan.student_taps() if plan else ()),
        ]
        try:
            features = collect_features([each.eval() for each in networks], loader)
        finally:
            for each in networks:
                each.release()
            student.model.train(training)
        blocks = Blocks.of(features.labels.tolist(), self.splits.classes)
        stages = [Stage("logits", LOGITS, LOGITS)]
        if plan is not None:
            teacher_classes = features.by_network[0][LOGITS].shape[1]
            stages = stages_of(plan, logits=min(teacher_classes, network.num_classes) > 0)
        neighbours = min(NEIGHBOURS, len(features.labels) - 1)
        compared = compare_graphs(stages, ("teacher", "student"), features, neighbours)
        return {each.stage.title.replace(" /", "-").replace(" ", "-"): _image(each, blocks) for each in compared}


def _image(compared: StageComparison, blocks: Blocks) -> NDArray[np.uint8]:
    from irgdistill.commands.inspect.figures import StageView, render, stage_figure

    numbers = compared.similarities["student"]["edges"]
    caption = f"squared difference {numbers['mse']:.4f}"
    if numbers["pearson"] is not None:
        caption += f"   Pearson {numbers['pearson']:.4f}"
    edges = {name: graph.edges.numpy() for name, graph in compared.graphs.items()}
    figure = stage_figure(StageView(compared.stage.title, edges, None, {"student": caption}), blocks)
    return np.asarray(Image.open(io.BytesIO(render(figure, "png"))).convert("RGB"))
