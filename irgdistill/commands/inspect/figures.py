"""Draws edge matrices and transformations from plain arrays.

Edges are drawn in cividis, differences in a map from dark blue through grey to light sand. The lightness of both
increases from end to end, so they are readable without colour and with any colour vision. Uses matplotlib without
pyplot, which would share state with the caller's own figures.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from numpy.typing import NDArray

from irgdistill.io import visible

Array = NDArray[Any]


EDGES: Colormap = matplotlib.colormaps["cividis"]


DIFFERENCE: Colormap = LinearSegmentedColormap.from_list(
    "difference", ["#0a1f5c", "#3f5f9e", "#9d9d9d", "#efb65a", "#fff3c4"]
)


TEACHER, STUDENT = "#173f6d", "#d98c1f"


INK, LINES = "#222222", "#ffffff"


NAME_LENGTH = 18


SHARE_SHOWN = 99.5
"""Percentage of the values inside a colour scale; the others get its end colours."""


@dataclass(frozen=True)
class Scale:
    """A colour scale from `low` to `high`."""

    colours: Colormap
    low: float
    high: float


@dataclass(frozen=True)
class Blocks:
    """Consecutive images of one class each."""

    names: tuple[str, ...]
    starts: tuple[int, ...]
    """First position of every block."""
    count: int
    """Number of images."""

    @classmethod
    def of(cls, labels: Sequence[int], classes: Sequence[str]) -> Blocks:
        """Build from labels sorted by class."""
        starts = [i for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
        return cls(tuple(visible(classes[labels[i]]) for i in starts), tuple(starts), len(labels))

    def centres(self) -> Array:
        """Centre of every block, in pixel coordinates."""
        ends = np.array([*self.starts[1:], self.count])
        centres: Array = (np.array(self.starts) + ends - 1) / 2
        return centres

    def thinned(self, room: int) -> list[int]:
        """Indices of at most `room` blocks, evenly spaced."""
        step = -(-len(self.names) // max(room, 1))
        return list(range(0, len(self.names), step))


@dataclass(frozen=True)
class StageView:
    """Arrays of one stage to draw. The first entry of a mapping is the teacher's, the others are the students'."""

    title: str
    edges: Mapping[str, Array]
    """Network -> (N, N)"""
    moved: Mapping[str, Array] | None
    """Network -> (N,)"""
    captions: Mapping[str, str]
    """Student -> its numbers in one line"""

    def differences(self) -> dict[str, Array]:
        """Student minus teacher."""
        (_, teacher), *students = self.edges.items()
        return {name: edges - teacher for name, edges in students}

    def scales(self) -> tuple[float, float]:
        """Upper end of the edges' scale, which starts at 0, and half width of the differences' scale around 0."""
        ends = []
        for arrays in (self.edges, self.differences()):
            values = [np.abs(array[~np.eye(len(array), dtype=bool)]) for array in arrays.values()]
            ends.append(max(float(np.percentile(value, SHARE_SHOWN)) for value in values) or 1.0)
        return ends[0], ends[1]


def stage_figure(stage: StageView, blocks: Blocks) -> Figure:
    """Edge heatmaps of the teacher and every student on one scale, and each student's difference on another."""
    students = len(stage.edges) - 1
    columns = 3 if students == 1 else 1 + students
    rows = 1 if students == 1 else 2
    figure = Figure(figsize=(4.0 * columns + 1.0, 4.75 * rows + 0.5), layout="compressed")
    figure.suptitle(f"Edges at {stage.title}", x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    grid = figure.subplots(rows, columns, squeeze=False)
    _heatmaps(list(grid.flat) if rows == 1 else [*grid[0], *grid[1, 1:]], stage, blocks, shared=rows == 1)
    if rows == 2:
        _text(grid[1, 0], [(name, stage.captions[name]) for name in list(stage.edges)[1:]])
    else:
        figure.supxlabel(stage.captions[list(stage.edges)[1]], fontsize=9, color=INK, x=0.01, ha="left")
    return figure


def transformation_figure(stages: Sequence[StageView], blocks: Blocks) -> Figure | None:
    """Transformation of every image in each stage: teacher upwards, student downwards. None if there are none."""
    shown = [stage for stage in stages if stage.moved is not None]
    if not shown:
        return None
    students = len(shown[0].edges) - 1
    figure = Figure(figsize=(max(11.0, 6.5 * students), 2.6 * len(shown) + 0.7), layout="constrained")
    title = "Transformations: how far each image moves within a stage, relative to the farthest"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    grid = figure.subplots(len(shown), students, squeeze=False)
    for row, stage in zip(grid, shown, strict=True):
        for axes, name in zip(row, list(stage.edges)[1:], strict=True):
            _bars(axes, stage, name, blocks)
            axes.set_title(f"{stage.title}: {name}", fontsize=10, loc="left", color=INK)
    return figure


def overview_figure(title: str, stages: Sequence[StageView], blocks: Blocks) -> Figure:
    """A row for every stage: edges, differences, transformations, numbers."""
    students = list(stages[0].edges)[1:]
    panels = 1 + 2 * len(students)
    moving = any(stage.moved is not None for stage in stages)
    width = 0.9 + 2.4 * panels + 3.8 * moving * len(students)
    figure = Figure(figsize=(width, 3.5 * len(stages) + 0.8), layout="constrained")
    figure.suptitle(visible(title), x=0.01, ha="left", fontsize=15, fontweight="bold", color=INK)
    for part, stage in zip(figure.subfigures(len(stages), 1, squeeze=False)[:, 0], stages, strict=True):
        caption = "      ".join(
            f"{name}: {stage.captions[name]}" if len(students) > 1 else stage.captions[name] for name in students
        )
        part.suptitle(f"{stage.title}   {caption}", x=0.01, ha="left", fontsize=9.5, color=INK)
        ratios = [2.4] * panels + [3.8] * moving * len(students)
        axes = part.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
        _heatmaps(list(axes[:panels]), stage, blocks, shared=True, size=6.5)
        for place, name in zip(axes[panels:], students, strict=False):
            if stage.moved is None:
                place.axis("off")
            else:
                _bars(place, stage, name, blocks, size=6.5)
                place.set_title(f"transformation: {name}", fontsize=8, color=INK)
    return figure


def render(figure: Figure, form: str) -> bytes:
    """The figure as a file in one of `requests.FIGURES`; equal figures give equal bytes. No text in it is TeX."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    stamp = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[form]
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "irgdistill"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format=form, dpi=120, facecolor="white", metadata=stamp)
    return file.getvalue()


def _heatmaps(places: Sequence[Axes], stage: StageView, blocks: Blocks, shared: bool, size: float = 8.0) -> None:
    """Draw teacher, students and differences, in this order, with a colour bar for each kind.

    `shared`: all are in one row, so only the first needs names on its vertical axis.
    """
    high, half = stage.scales()
    networks = list(stage.edges.items())
    first, second = places[: len(networks)], places[len(networks) :]
    for number, (axes, (name, edges)) in enumerate(zip(first, networks, strict=True)):
        image = _heatmap(axes, edges, name, blocks, Scale(EDGES, 0.0, high), size, names=number == 0)
    _bar_beside(first, image, f"edge, 0 to {high:.2g}", size, "max")
    scale = Scale(DIFFERENCE, -half, half)
    for number, (axes, (name, edges)) in enumerate(zip(second, stage.differences().items(), strict=True)):
        title = f"{_short(name, 22)} − teacher"
        image = _heatmap(axes, edges, title, blocks, scale, size, names=not shared and number == 0)
    _bar_beside(second, image, "dark: closer than in the teacher, light: farther", size, "both")


def _heatmap(
    axes: Axes,
    values: Array,
    title: str,
    blocks: Blocks,
    scale: Scale,
    size: float,
    names: bool,
) -> AxesImage:
    image = axes.imshow(values, cmap=scale.colours, vmin=scale.low, vmax=scale.high)
    axes.set_title(_short(title, 34), fontsize=size + 1.5, color=INK)
    _name_classes(axes, blocks, "x", size)
    _name_classes(axes, blocks, "y", size)
    if not names:
        axes.set_yticklabels([])
    if len(blocks.starts) * 4 <= max(blocks.count, 8):
        for start in blocks.starts[1:]:
            axes.axhline(start - 0.5, color=LINES, linewidth=0.5)
            axes.axvline(start - 0.5, color=LINES, linewidth=0.5)
    return image


def _bar_beside(places: Sequence[Axes], image: AxesImage, label: str, size: float, extend: str) -> None:
    bar = places[0].figure.colorbar(image, ax=places, location="bottom", shrink=0.7, aspect=35, pad=0.02, extend=extend)
    bar.set_label(label, fontsize=size, color=INK)
    bar.ax.tick_params(labelsize=size)


def _name_classes(axes: Axes, blocks: Blocks, axis: str, size: float) -> None:
    """Write class names at the centres of their blocks, as many as fit."""
    figure = axes.figure
    inches = float(axes.get_position().width * figure.bbox.width / figure.dpi)
    shown = blocks.thinned(int(inches * 72 / (size * 1.7)))  # the layout still shrinks the axes
    labels = [_short(blocks.names[i], NAME_LENGTH) for i in shown]
    places = blocks.centres()[shown]
    if axis == "y":
        axes.set_yticks(places, labels, fontsize=size)
    else:
        horizontal = max(map(len, labels)) * len(labels) * size * 0.75 < inches * 72
        axes.set_xticks(places, labels, fontsize=size, rotation=0 if horizontal else 90)
    axes.tick_params(axis=axis, length=0, pad=2, labelcolor=INK)  # type: ignore[arg-type]


def _bars(axes: Axes, stage: StageView, name: str, blocks: Blocks, size: float = 8.0) -> None:
    assert stage.moved is not None
    teacher = next(iter(stage.moved))
    for network, colour, sign in ((teacher, TEACHER, 1), (name, STUDENT, -1)):
        heights = sign * stage.moved[network]
        left = np.arange(len(heights)) - 0.42
        zero = np.zeros_like(left)
        corners = [(left, zero), (left, heights), (left + 0.84, heights), (left + 0.84, zero)]
        bars = np.stack([np.stack(corner, axis=1) for corner in corners], axis=1)
        axes.add_collection(PolyCollection(list(bars), facecolors=colour, linewidths=0))
        axes.text(
            *(-0.4, 1.05 * sign),
            _short(network if sign < 0 else "teacher", 34),
            va="bottom" if sign > 0 else "top",
            fontsize=size,
            color=colour,
        )
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set(xlim=(-0.6, blocks.count - 0.4), ylim=(-1.35, 1.35))
    axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["1", "0.5", "0", "0.5", "1"], fontsize=size)
    _name_classes(axes, blocks, "x", size)
    axes.spines[["top", "right"]].set_visible(False)
    if len(blocks.starts) * 4 <= max(blocks.count, 8):
        for start in blocks.starts[1:]:
            axes.axvline(start - 0.5, color="#bbbbbb", linewidth=0.5, zorder=0)


def _text(axes: Axes, lines: Sequence[tuple[str, str]]) -> None:
    axes.axis("off")
    for number, (name, caption) in enumerate(lines):
        text = name + "\n" + caption.replace("   ", "\n")
        axes.text(0, 0.95 - 0.5 * number, text, va="top", fontsize=9, color=INK, linespacing=1.5)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
