"""Draws docs/images/overview.png: the graphs of teacher and student beside accuracy against cost, from the records.

python docs/draw_overview.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
GRAPHS = (slice(30, 530), slice(140, 1020))
"""The part of edges.png with the teacher's and the student's graph: rows, columns."""
ALONE = {"none": "student"}
"""Method of the comparison -> its name in the step benchmark, where they differ."""
BESIDE = {"irg": (6, -12), "irg+kd": (6, 4), "kd+at": (6, 4), "mtk": (6, -12), "irg+kd+at": (-62, -16)}
"""Where a label stands, in points from its mark."""
INK, ACCENT = "#222222", "#3f51b5"


def read(name: str) -> dict[str, dict[str, Any]]:
    """Rows of a record by method."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return {row["method"]: row for row in rows}


def draw() -> Figure:
    """Step time over that of the student and one forward of the teacher, against top-1, mean and deviation."""
    cost, accuracy = read("step-cifar-128"), read("small-cifar_resnet20_x0_5")
    figure = Figure(figsize=(12.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.75, 1.0))
    left.imshow(imread(IMAGES / "edges.png")[GRAPHS])
    left.set_axis_off()
    left.set_title("How teacher and student relate 60 images", loc="left", color=INK, fontweight="bold")
    for method, row in accuracy.items():
        step = cost.get(ALONE.get(method, method))
        if step is not None:
            x, y = step["over_floor"], row["top1_mean"]
            colour = ACCENT if "irg" in method or method == "mtk" else INK
            right.errorbar(x, y, row["top1_std"], fmt="o", color=colour, capsize=2, linewidth=1)
            place = BESIDE.get(method, (6, 4))
            right.annotate(method, (x, y), place, textcoords="offset points", color=colour, fontsize=9)
    right.set_title("Accuracy against cost", loc="left", color=INK, fontweight="bold")
    right.set_xlabel("step time; 1 is the student's step and one forward of the teacher", color=INK, fontsize=9)
    right.set_ylabel("top-1 %, 3 seeds", color=INK, fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    right.grid(color="#dddddd", linewidth=0.6)
    return figure


if __name__ == "__main__":
    draw().savefig(IMAGES / "overview.png", dpi=110)
