"""Heatmaps on a terminal: coloured half blocks, or characters of increasing density without colour.

Neither rich nor another dependency draws heatmaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from irgdistill.commands.inspect.figures import DIFFERENCE, EDGES, StageView
from irgdistill.io import visible

Array = NDArray[Any]


GAP = 2


WIDEST = 48
"""Columns of one heatmap at most."""


DENSITY = " ░▒▓█", " .:*#"
"""From 0 to the end of the scale: in Unicode, and in plain ASCII."""


SIGNED = "#=·+@", "#=.+@"
"""From much closer than in the teacher, through equal, to much farther."""


def show(console: Console, stages: Sequence[StageView]) -> None:
    """Print the heatmaps of every stage side by side, averaged down to the console's width."""
    colour = console.is_terminal and not console.no_color and console.color_system in ("256", "truecolor")
    plain = not (console.encoding or "").lower().startswith("utf")
    for stage in stages:
        high, half = stage.scales()
        panels = [(name, edges / high, EDGES) for name, edges in stage.edges.items()]
        panels += [(f"{name} - teacher", 0.5 + d / (2 * half), DIFFERENCE) for name, d in stage.differences().items()]
        room = max((console.width - GAP * (len(panels) - 1)) // len(panels), 2)
        side = min(room, WIDEST, len(panels[0][1])) // 2 * 2
        columns = []
        for name, values, colours in panels:
            if colour:
                lines = half_blocks(average(values, side, side), colours)
            else:
                lines = [Text(line) for line in density(average(values, side // 2, side), colours is DIFFERENCE, plain)]
            columns.append([Text(visible(name)[:room]), *lines])
        scale = f"edges 0 to {high:.2g}, differences -{half:.2g} to {half:.2g}"
        _print(console, Text(f"\n{visible(stage.title)}: {scale}", style="bold"))
        for row in zip(*columns, strict=True):
            line = Text()
            for part in row:
                part.pad_right(max(side, min(room, 24)) - len(part) + GAP)
                line.append_text(part)
            line.rstrip()
            _print(console, line)
    if not colour:
        low, signs = DENSITY[plain], SIGNED[plain]
        _print(
            console,
            Text(
                f"\nedges: {low!r} from 0 up; differences: {signs[:2]} closer than in the teacher, "
                f"{signs[2]} equal, {signs[3:]} farther"
            ),
        )


def _print(console: Console, line: Text) -> None:
    console.print(line, soft_wrap=True, highlight=False)


def average(values: Array, rows: int, columns: int) -> Array:
    """Average down to (rows, columns): means over parts of nearly equal size, with at least one value each."""
    for axis, parts in ((0, rows), (1, columns)):
        count = values.shape[axis]
        starts = (np.arange(parts) * count) // parts
        sums = np.add.reduceat(values, starts, axis=axis)
        sizes = np.maximum(np.diff([*starts, count]), 1)
        values = sums / (sizes[:, None] if axis == 0 else sizes)
    return values


def half_blocks(values: Array, colours: Colormap) -> list[Text]:
    """(2h, w) in 0 to 1 -> h lines; each character shows two values, one above the other."""
    rgb = colours(np.clip(values, 0, 1), bytes=True)[..., :3].astype(int)
    lines = []
    for upper, lower in zip(rgb[::2], rgb[1::2], strict=True):
        line = Text()
        for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True):
            line.append("▀", Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom)))
        lines.append(line)
    return lines


def density(values: Array, signed: bool, plain: bool) -> list[str]:
    """(h, w) in 0 to 1 -> h lines of characters."""
    characters = np.array(list((SIGNED if signed else DENSITY)[plain]))
    steps = np.clip((values * len(characters)).astype(int), 0, len(characters) - 1)
    return ["".join(line) for line in characters[steps]]
