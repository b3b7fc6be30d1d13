"""Terms on whole feature maps, image by image: FitNet hints, attention maps, FSP matrices.

Shapes: B images, C channels, H×W the map. Maps of different sizes are average-pooled to the smaller height and width;
where widths must agree and do not, a trained 1×1 convolution takes the student's to the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from irgdistill import matching
from irgdistill.errors import UserError
from irgdistill.lazy import lazy
from irgdistill.losses.base import Batch, Skip, Term, TermContext, TermSettings, term

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from irgdistill import graph
    from irgdistill.losses import adapters
    from irgdistill.matching import Plan, Tap
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")
    graph, adapters = lazy("irgdistill.graph"), lazy("irgdistill.losses.adapters")


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (…, H, W) -> both pooled to the smaller height and width of the two."""
    size = min(a.shape[-2], b.shape[-2]), min(a.shape[-1], b.shape[-1])
    a, b = (x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return a, b


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two maps (B, C, H, W), the student's after its regressor.

    Romero et al. 2015, equation 3: ½ of the sum over (C, H, W), there the only loss of a first phase. Here it stands
    beside the labels for the whole run, as is usual in comparisons.
    """
    student, teacher = same_size(student, teacher)
    return F.mse_loss(graph.widen(student), graph.widen(teacher))


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two attention maps, 2 - 2·cosine, mean over images. Zagoruyko & Komodakis 2017, equation 2.

    Given are (B, H, W), squares summed over channels (section 3.1); they are brought to one size and unit length.
    Squared, as in the authors' code, without the root and the ½ of the equation.
    """
    student, teacher = (graph.unit(graph.widen(x).flatten(1)) for x in same_size(student, teacher))
    return (student - teacher).square().sum(1).mean()


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`attention_distance` over the number of positions, as in the authors' code: small maps count for more."""
    student, teacher = same_size(student, teacher)
    return attention_distance(student, teacher) / student[0].numel()


def fsp_matrix(first: Tensor, last: Tensor) -> Tensor:
    """(B, M, H, W), (B, N, H, W) -> (B, M, N): products over the map, divided by H·W. Yim et al. 2017, equation 1."""
    first, last = same_size(graph.widen(first), graph.widen(last))
    return first.flatten(2) @ last.flatten(2).transpose(1, 2) / first[0, 0].numel()


def fsp_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over (B, M, N) of the squared difference of the FSP matrices of (first, last). Yim et al. 2017, equation 2.

    The maps of the two networks need no common size: a matrix has none of it.
    """
    return F.mse_loss(fsp_matrix(*student), fsp_matrix(*teacher))


def _with_map(stages: Sequence[tuple[Tap, ...]]) -> list[tuple[Tap, ...]]:
    return [taps for taps in stages if all(tap.layout in matching.MAP_LAYOUTS for tap in taps)]


def attended(plan: Plan) -> list[tuple[Tap, ...]]:
    """Ends of the stages (teacher, student) that have a map in both networks."""
    return _with_map([(pair.teacher.exit, pair.student.exit) for pair in plan.pairs])


def mappable(stages: Sequence[tuple[Tap, ...]], term: str) -> list[tuple[Tap, ...]]:
    """The stages whose taps all have a map. Raises UserError where no stage is left for `term`."""
    kept = _with_map(stages)
    if not kept:
        raise UserError(f"{term} compares feature maps, and no matched stage has one in both networks")
    return kept


@term("fitnet", weight=100.0, compares="maps", source="Romero et al. 2015", place=7)
class Hint(Term):
    """The middle stage's map through a 1×1 convolution (Romero et al. 2015).

    The convolution has a batch norm. Weight 100: that of the usual comparisons (RepDistiller, mdistiller), whose
    regressor and mean these are.
    """

    def __init__(self, settings: TermSettings, context: TermContext) -> None:
        stages = mappable([(pair.teacher.exit, pair.student.exit) for pair in context.plan.pairs], "fitnet")
        teacher, student = stages[(len(stages) - 1) // 2]
        self.teacher_maps, self.student_maps = (teacher,), (student,)
        self.teacher = matching.tap_name(teacher)
        self.adapter = adapters.Widen([(teacher, student)], keep=False)

    def __call__(self, batch: Batch) -> Tensor:
        return hint_loss(batch.student.adapted["fitnet"]["0"], batch.teacher.maps[self.teacher])


class AttentionMaps(Term):
    """A distance of attention maps, mean over the stages that have a map in both networks."""

    distance: Callable[[Tensor, Tensor], Tensor]

    def _compare(self, stages: Sequence[tuple[Tap, ...]]) -> None:
        self.teacher_energies, self.student_energies = zip(*stages, strict=True)
        self.stages = [(matching.tap_name(teacher), matching.tap_name(student)) for teacher, student in stages]

    def __call__(self, batch: Batch) -> Tensor:
        student, teacher = batch.student.energies, batch.teacher.energies
        return torch.stack([type(self).distance(student[s], teacher[t]) for t, s in self.stages]).mean()


@term("at", weight=3000.0, compares="energies", source="Zagoruyko & Komodakis 2017", place=8)
class MeanAttention(AttentionMaps):
    """Attention maps of every stage as their authors weigh them: a mean over positions.

    `attention_loss`. Weight 3000: the authors' beta of 1000 on the sum over three stages, each a mean over images and
    positions.
    """

    distance = staticmethod(attention_loss)

    def __init__(self, settings: TermSettings, context: TermContext) -> None:
        self._compare(mappable(attended(context.plan), "at"))


@term("attention", compares="energies", source="Zagoruyko & Komodakis 2017", place=5)
class Attention(AttentionMaps):
    """Attention maps of every stage (Zagoruyko & Komodakis 2017), whatever their size.

    `attention_distance`, which weighs a stage the same at any size of its map. It is skipped if no stage has a map and
    another term compares features of the stages.
    """

    distance = staticmethod(attention_distance)

    def __init__(self, settings: TermSettings, context: TermContext) -> None:
        if not attended(context.plan) and context.compared("features"):
            raise Skip("no attention term: no matched stage has a feature map in both networks")
        self._compare(mappable(attended(context.plan), "attention"))


@term("fsp", weight=150.0, compares="maps", source="Yim et al. 2017", place=9)
class FlowMatrices(Term):
    """FSP matrices of every stage (Yim et al. 2017).

    `fsp_loss` between the first and last block of each stage, mean over the stages. The paper's networks are equally
    wide. Where they are not, the student's maps go through 1×1 convolutions with batch norm (ours). Weight 150:
    RepDistiller's 50 on the sum over three stages, each a mean.
    """

    def __init__(self, settings: TermSettings, context: TermContext) -> None:
        moves = [move for pair in context.plan.pairs if (move := pair.transformation()) is not None]
        stages = mappable([(*teacher, *student) for teacher, student in moves], "fsp")
        self.teacher_maps = [tap for first, last, *_ in stages for tap in (first, last)]
        self.student_maps = [tap for *_, first, last in stages for tap in (first, last)]
        self.ends = [matching.tap_name(tap) for tap in self.teacher_maps]
        self.adapter = adapters.Widen(list(zip(self.teacher_maps, self.student_maps, strict=True)), keep=True)

    def __call__(self, batch: Batch) -> Tensor:
        student = [batch.student.adapted["fsp"][str(i)] for i in range(len(self.ends))]
        teacher = [batch.teacher.maps[name] for name in self.ends]
        stages = range(0, len(self.ends), 2)
        return torch.stack([fsp_loss(student[i : i + 2], teacher[i : i + 2]) for i in stages]).mean()
