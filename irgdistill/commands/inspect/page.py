"""Builds the report as one HTML file without a framework or network requests, which opens from disk.

All data are in one JSON block, matrices as base64 of little-endian numbers. The page builds its text from that block
with `textContent`, so names of images and classes are never parsed as HTML.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray
from PIL import Image

from irgdistill.commands.inspect.figures import DIFFERENCE, EDGES, StageView
from irgdistill.io import visible_values

Array = NDArray[Any]


LEVELS = 65535
"""Steps from 0 to 1 to which edges and transformations are rounded: an error of at most 0.000008."""


def build_page(
    facts: Mapping[str, Any],
    stages: Sequence[StageView],
    neighbours: Sequence[Mapping[str, Array]],
    thumbnails: Sequence[Array],
    overview: bytes,
) -> str:
    """Build the page.

    `facts` is the content of graph.json; `neighbours` maps, for every stage, network -> (N, k); `thumbnails` are N
    times (h, w, 3) uint8; `overview` is the overview figure as PNG.
    """
    data = {
        "facts": facts,
        "levels": LEVELS,
        "stages": [_stage(stage, near) for stage, near in zip(stages, neighbours, strict=True)],
        "pixels": max(thumbnails[0].shape),
        "thumbnails": [_base64(_jpeg(pixels)) for pixels in thumbnails],
        "colours": {"edges": _lookup(EDGES), "difference": _lookup(DIFFERENCE)},
        "overview": _base64(overview),
    }
    parts = {"STYLE": _asset("page.css"), "SCRIPT": _asset("page.js"), "DATA": _script_json(visible_values(data))}
    head, *rest = _asset("page.html").split("/*@")
    return head + "".join(parts[name] + tail for name, tail in (part.split("@*/", 1) for part in rest))


def _stage(stage: StageView, neighbours: Mapping[str, Array]) -> dict[str, Any]:
    high, half = stage.scales()
    above = np.triu_indices(len(next(iter(stage.edges.values()))), 1)
    return {
        "title": stage.title,
        "high": high,
        "half": half,
        "edges": {name: _steps(edges[above]) for name, edges in stage.edges.items()},
        "moved": None if stage.moved is None else {name: _steps(moved) for name, moved in stage.moved.items()},
        "neighbours": {name: _base64(near.astype("<u2").tobytes()) for name, near in neighbours.items()},
    }


def _steps(values: Array) -> str:
    return _base64((np.clip(values, 0, 1) * LEVELS).round().astype("<u2").tobytes())


def _jpeg(pixels: Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=88)
    return file.getvalue()


def _lookup(colours: Colormap) -> str:
    return _base64(colours(np.arange(256), bytes=True)[:, :3].tobytes())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _asset(name: str) -> str:
    return (files("irgdistill.commands.inspect") / "assets" / name).read_text(encoding="utf-8")


def _script_json(data: Any) -> str:
    """JSON for a script element, which it can neither end nor turn into a comment."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
