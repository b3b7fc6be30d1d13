"""Compares the student's graph of held-out images with the teacher's: the progress of a run without classes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irgdistill.data import KeptLoader, Loader
from irgdistill.errors import DataError
from irgdistill.graph import edge_matrix
from irgdistill.matching import Tapped
from irgdistill.runtime import World
from irgdistill.training.evaluation import Metrics, now
from irgdistill.training.probes import knn_top1
from irgdistill.training.similarity import agreement, each_pair, nearest_neighbours, pearson

HELD_OUT_IMAGES = 2000
"""Images that are compared, evenly spaced: every pair of them is an edge."""

NEIGHBOURS = 10
"""Nearest images of which the share that both networks have in common is measured; a quarter of few images."""

Project = Callable[[Tensor], Tensor]


class HeldOutGraph:
    """Images of `loader`, and the teacher's embeddings of them with their k-NN accuracy, which are computed once.

    `teacher` is None where a cache answers for it. `labelled`: the images have labels, by which neighbours are judged.
    """

    def __init__(
        self,
        loader: Loader | KeptLoader,
        autocast: AbstractContextManager[Any],
        world: World,
        teacher: Tapped | None,
        labelled: bool,
    ) -> None:
        self.loader, self.autocast, self.world, self.labelled = loader, autocast, world, labelled
        self.teacher = teacher
        self._embeddings: Tensor | None = None
        self._teachers_accuracy: float | None = None

    def measure(self, student: Tapped, project: Project | None = None) -> Metrics:
        """Edge correlation, shared neighbours and k-NN accuracy of the student's embeddings.

        With `project`, from the student's to the teacher's embeddings, also their mean cosine, each minus its mean.
        Every process runs its part of the images and gets the metrics of all. Raises DataError if no image can be
        read.
        """
        own, labels, speed = self._run(student)
        values: dict[str, Any] = {"images": len(own), "images_per_second": speed}
        if self.labelled:
            values["knn_top1"] = leave_one_out(own, labels)
        if self.teacher is not None:
            if self._embeddings is None:
                self._embeddings = self._run(self.teacher)[0]
                self._teachers_accuracy = leave_one_out(self._embeddings, labels) if self.labelled else None
            values |= {**compare(own, self._embeddings), "teacher_knn_top1": self._teachers_accuracy}
            if project is not None:
                with torch.no_grad():
                    here, there = (x - x.mean(0) for x in (project(own).float(), self._embeddings))
                values["embedding_cosine"] = float(F.cosine_similarity(here, there).mean())
        return Metrics(**values)

    @torch.no_grad()
    def _run(self, network: Tapped) -> tuple[Tensor, Tensor, float]:
        """Embeddings (N, D) and labels (N,) of the images of all processes, and images per second of all."""
        training = network.training
        network.eval()
        embeddings, labels = list[Tensor](), list[Tensor]()
        seconds, timed = 0.0, 0
        for images, targets in self.loader.epoch():
            start = now(self.loader.device)
            with self.autocast:
                embedding = network(images).embedding
            if embeddings:  # the first batch warms up
                seconds, timed = seconds + now(self.loader.device) - start, timed + len(targets)
            embeddings.append(embedding)
            labels.append(targets)
        network.train(training)
        device = self.loader.device
        found = [(torch.cat(embeddings).cpu(), torch.cat(labels).cpu())] if labels else []
        pairs = [pair for process in self.world.collect(found) for pair in process]
        if not pairs:
            raise DataError("no validation image can be read")
        times = self.world.collect((timed, seconds))
        speed = sum(count for count, _ in times) / max(max(took for _, took in times), 1e-9)
        return torch.cat([x for x, _ in pairs]).to(device), torch.cat([y for _, y in pairs]).to(device), speed


def compare(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Correlation of the edges, and percent of shared neighbours, of embeddings (N, D) and (N, E); 0 if undefined."""
    if len(student) < 3:  # there is no choice of neighbours
        return {"edge_correlation": 0.0, "neighbours": 0.0}
    count = max(min(NEIGHBOURS, len(student) // 4), 1)
    edges = [edge_matrix(x) for x in (student, teacher)]
    shared = agreement(*(nearest_neighbours(x, count) for x in edges)) if all(x.any() for x in edges) else 0.0
    return {"edge_correlation": pearson(*map(each_pair, edges)) or 0.0, "neighbours": 100 * shared}


def leave_one_out(embeddings: Tensor, labels: Tensor) -> float:
    """k-NN accuracy in percent, each image among all others.

    Of 20 neighbours, or as many as the median class has others: more would outvote a class of few images.
    """
    others = int(labels.unique(return_counts=True)[1].median()) - 1
    return knn_top1(embeddings, labels, embeddings, labels, k=min(max(others, 1), 20), leave_one_out=True)
