"""What trains: the student with what some terms train beside it."""

from __future__ import annotations

from torch import Tensor, nn

from irgdistill.matching import Output


class Learner(nn.Module):
    """Student and adapters in one forward, so that DDP wraps them together; the student alone is evaluated."""

    def __init__(self, student: nn.Module, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.student = student
        self.adapters = adapters

    def forward(self, images: Tensor) -> Output:
        output: Output = self.student(images)
        return output._replace(adapted={name: adapter(images, output) for name, adapter in self.adapters.items()})
