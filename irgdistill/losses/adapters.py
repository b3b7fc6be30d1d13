"""Networks that are trained beside the student and are no part of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from irgdistill.losses.queue import Queue
from irgdistill.matching import Output, Tap, Tapped, tap_name


class Learner(nn.Module):
    """Student and adapters in one forward, so that DDP wraps them together; the student alone is evaluated."""

    def __init__(self, student: nn.Module, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.student = student
        self.adapters = adapters

    def forward(self, images: Tensor) -> Output:
        output: Output = self.student(images)
        return output._replace(adapted={name: adapter(images, output) for name, adapter in self.adapters.items()})


class Widen(nn.Module):
    """1×1 convolutions with batch norm from the student's widths to the teacher's, for the pairs of taps in `taps`.

    The batch norm makes the scale of the result independent of the learning rate. With `keep`, maps of equal width
    pass unchanged. The results are named by their number in `taps`.
    """

    def __init__(self, taps: Sequence[tuple[Tap, Tap]], keep: bool) -> None:
        super().__init__()
        self.names = [tap_name(student) for _, student in taps]
        self.layers = nn.ModuleList(
            nn.Identity()
            if keep and student.channels == teacher.channels
            else nn.Sequential(
                nn.Conv2d(student.channels, teacher.channels, 1, bias=False), nn.BatchNorm2d(teacher.channels)
            )
            for teacher, student in taps
        )

    def forward(self, images: Tensor, output: Output) -> dict[str, Tensor]:
        maps = [output.maps[name] for name in self.names]
        return {str(i): layer(x) for i, (x, layer) in enumerate(zip(maps, self.layers, strict=True))}


class Booster(nn.Module):
    """A second network of its own logits, as the adapter of the term that trains it."""

    def __init__(self, network: Tapped) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, output: Output) -> dict[str, Tensor]:
        return {"logits": self.network(images).logits}


class Project(nn.Module):
    """A linear layer from the pooled features at a tap of the student to `width` numbers."""

    def __init__(self, tap: Tap, width: int) -> None:
        super().__init__()
        self.name = tap_name(tap)
        self.layer = nn.Linear(tap.channels, width)

    def forward(self, images: Tensor, output: Output) -> dict[str, Tensor]:
        return {"projected": self.layer(output.features[self.name])}


class Contrast(nn.Module):
    """Linear embeddings of both networks' pooled features, and the latest of them with their labels.

    The term itself applies `teacher`, as the teacher's features are not known here.
    """

    def __init__(self, student: Tap, teacher: Tap, width: int, length: int) -> None:
        super().__init__()
        self.name = tap_name(student)
        self.student, self.teacher = nn.Linear(student.channels, width), nn.Linear(teacher.channels, width)
        empty = torch.zeros(width)
        self.queue = Queue(length, student=empty, teacher=empty, labels=torch.tensor(-1))

    def forward(self, images: Tensor, output: Output) -> dict[str, Tensor]:
        return {"embedding": self.student(output.features[self.name])}


class Projector(nn.Module):
    """A linear layer from the student's embedding to the teacher's width, and the teacher's latest embeddings.

    `filled` marks the rows of the queue that hold an embedding.
    """

    def __init__(self, width: int, teacher_width: int, length: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, teacher_width)
        self.queue = Queue(length, teacher=torch.zeros(teacher_width), filled=torch.tensor(False)) if length else None

    def forward(self, images: Tensor, output: Output) -> dict[str, Tensor]:
        assert output.embedding is not None
        return {"projected": self.linear(output.embedding)}
