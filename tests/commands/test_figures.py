"""Figures and their terminal form, from arrays alone."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from irgdistill.commands.inspect.figures import (
    DIFFERENCE,
    EDGES,
    Blocks,
    StageView,
    overview_figure,
    render,
    stage_figure,
    transformation_figure,
)
from irgdistill.commands.inspect.terminal import average, half_blocks, show


def edges(count: int, seed: int) -> NDArray[np.float64]:
    points = np.random.default_rng(seed).normal(size=(count, 3))
    distances = ((points[:, None] - points[None]) ** 2).sum(2)
    return distances / distances.max()


def view(count: int = 12, students: int = 1, moved: bool = True) -> StageView:
    names = ["teacher $t$", "a", "b"][: students + 1]
    moves = {name: np.random.default_rng(i).random(count) for i, name in enumerate(names)} if moved else None
    matrices = {name: edges(count, i) for i, name in enumerate(names)}
    return StageView("stage /4", matrices, moves, {name: "Pearson 0.5   CKA 0.4" for name in names[1:]})


def blocks(count: int = 12, classes: int = 3) -> Blocks:
    names = [f"class_{i} with a $long$ name 猫" for i in range(classes)]
    return Blocks.of(sorted(i % classes for i in range(count)), names)


def lightness(colours: Colormap) -> NDArray[np.float64]:
    """L* of CIE Lab along a colour map."""
    rgb = colours(np.arange(256))[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return np.asarray(116 * np.cbrt(luminance) - 16)


@pytest.mark.parametrize("colours", [EDGES, DIFFERENCE])
def test_colours_are_told_apart_without_colour(colours: Colormap) -> None:
    values = lightness(colours)
    assert (np.diff(values) > -0.2).all() and values[-1] - values[0] > 60


def test_the_two_signs_of_a_difference_are_darker_and_lighter_than_none() -> None:
    values = lightness(DIFFERENCE)
    assert values[127] - values[0] > 30 and values[-1] - values[128] > 25


def test_scales_are_shared_and_centred() -> None:
    stage = view(students=2)
    high, half = stage.scales()
    figure = stage_figure(stage, blocks())
    limits = [image.get_clim() for axes in figure.axes for image in axes.images if image.get_array().ndim == 2]
    assert limits.count((0.0, high)) == 3 and limits.count((-half, half)) == 2
    assert list(stage.differences()) == ["a", "b"]
    assert np.allclose(stage.differences()["a"], stage.edges["a"] - stage.edges["teacher $t$"])


def test_equal_graphs_have_a_scale() -> None:
    flat = np.zeros((4, 4))
    assert StageView("x", {"t": flat, "s": flat}, None, {"s": ""}).scales() == (1.0, 1.0)


def test_blocks_name_their_middle_and_are_thinned() -> None:
    some = Blocks.of([0, 0, 2, 2, 2, 5], list("abcdef"))
    assert some.names == ("a", "c", "f") and some.starts == (0, 2, 5)
    assert some.centres().tolist() == [0.5, 3, 5]
    many = blocks(1000, 1000)
    assert len(many.thinned(20)) <= 20 and many.thinned(0) == [0] and some.thinned(9) == [0, 1, 2]


def names_do_not_overlap(figure: Figure) -> bool:
    figure.canvas.draw()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            if any(a.overlaps(b) for a, b in zip(boxes[1:], boxes[:-1], strict=True)):
                return False
    return True


@pytest.mark.parametrize(("count", "classes", "students"), [(12, 3, 1), (256, 100, 1), (64, 64, 2), (2, 2, 1)])
def test_class_names_do_not_overlap(count: int, classes: int, students: int) -> None:
    some = blocks(count, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = stage_figure(view(count, students), some)
        assert names_do_not_overlap(figure)
        bars = transformation_figure([view(count, students)], some)
        assert bars is not None and names_do_not_overlap(bars)


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_the_same_figure_gives_the_same_bytes(form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (render(stage_figure(view(), blocks()), form) for _ in range(2))
    assert first == second
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[form]
    assert first.startswith(start) and (form != "svg" or b"$t$" in first)


def test_the_overview_has_everything() -> None:
    stages = [view(students=2), view(students=2, moved=False)]
    figure = overview_figure("t → a, b", stages, blocks())
    titles = [axes.get_title() for axes in figure.axes]
    for title in ("teacher $t$", "a", "b", "a − teacher", "b − teacher"):
        assert titles.count(title) == 2
    assert titles.count("transformation: a") == titles.count("transformation: b") == 1
    image = Image.open(io.BytesIO(render(figure, "png")))
    pixels = np.asarray(image.convert("L"))
    assert pixels.min() < 60 and pixels.shape[1] > pixels.shape[0]


def test_without_transformations_there_is_no_such_figure() -> None:
    assert transformation_figure([view(moved=False)], blocks()) is None


def test_figures_leave_pyplot_alone() -> None:
    code = "import sys, irgdistill.commands.inspect.figures\n"
    code += "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- on a terminal ----------------------------------------------------------------------------------------------------


def test_shrinking_takes_means() -> None:
    values = np.arange(25.0).reshape(5, 5)
    small = average(values, 2, 2)
    assert small.tolist() == [
        [values[:2, :2].mean(), values[:2, 2:].mean()],
        [values[2:, :2].mean(), values[2:, 2:].mean()],
    ]
    assert average(values, 5, 5).tolist() == values.tolist()


def printed(width: int, **options: object) -> str:
    file = io.StringIO()
    show(Console(file=file, width=width, **options), [view(64, 2)])  # type: ignore[arg-type]
    return file.getvalue()


def test_half_blocks_carry_two_values_each() -> None:
    lines = half_blocks(np.array([[0.0, 1.0], [1.0, 0.0]]), EDGES)
    assert len(lines) == 1 and lines[0].plain == "▀▀"
    style = lines[0].spans[0].style
    low, high = (list(EDGES(end, bytes=True)[:3]) for end in (0.0, 1.0))
    assert list(style.color.triplet) == low and list(style.bgcolor.triplet) == high  # type: ignore[union-attr]


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("colour", [True, False])
def test_the_terminals_width_is_kept(width: int, colour: bool) -> None:
    options = {"force_terminal": True, "color_system": "truecolor"} if colour else {}
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed(width, **options)).splitlines()
    drawn = [line for line in lines if set(line) <= set(" ░▒▓█#=·+@▀") and line.strip()]
    assert len(drawn) >= 3 and all(width // 3 < len(line) <= width for line in drawn)


def test_colour_only_where_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    colour = printed(80, force_terminal=True, color_system="truecolor")
    assert "▀" in colour and "\x1b[38;2;" in colour
    for text in (printed(80), printed(80, force_terminal=True, color_system="truecolor", no_color=True)):
        assert "▀" not in text and "\x1b[38" not in text and "▒" in text and "+" in text and "=" in text
