"""The curves of a comparison, drawn from plain arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from irgdistill.commands.inspect.figures import INK
from irgdistill.io import visible


def curves_figure(title: str, curves: Mapping[str, Sequence[Sequence[float | None]]], metric: str = "top-1") -> Figure:
    """A metric in percent by epoch: per method the mean over its seeds, shaded from lowest to highest.

    None are gaps; the runs of a method may have different numbers of epochs.
    """
    figure = Figure(figsize=(9.0, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(visible(title), loc="left", fontsize=12, fontweight="bold", color=INK)
    colours = matplotlib.colormaps["tab20" if len(curves) > 10 else "tab10"]
    for number, (name, seeds) in enumerate(curves.items()):
        by_epoch = np.array([*zip_longest(*seeds)], dtype=float).reshape(-1, len(seeds))
        values = np.ma.masked_invalid(by_epoch)
        epochs = np.arange(1, len(values) + 1)
        axes.plot(
            epochs,
            values.mean(1),
            color=colours(number),
            linewidth=1.6,
            marker="." * (len(epochs) == 1),
            label=visible(name),
        )
        axes.fill_between(epochs, values.min(1), values.max(1), color=colours(number), alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"validation {metric} %", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    return figure
