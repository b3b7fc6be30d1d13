"""Networks that are trained beside the student and are no part of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

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
