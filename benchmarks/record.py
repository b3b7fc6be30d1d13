"""What every record says about where it was made."""

from __future__ import annotations

import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from irgdistill.runtime import instructions


def save(path: Path | None, rows: list[dict[str, Any]], libraries: tuple[str, ...] = (), **about: Any) -> None:
    """Rows, `about`, machine and versions as JSON; nothing without a path."""
    if path is None:
        return
    machine: dict[str, Any] = {"processor": platform.processor() or platform.machine()}
    machine |= {"threads": torch.get_num_threads(), "instructions": instructions()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: version(name) for name in libraries}
    path.write_text(json.dumps({"rows": rows, **about, "machine": machine, "versions": versions}, indent=1) + "\n")


def epoch_rows(times: dict[str, list[float]], control: str, name: str, images: int) -> list[dict[str, Any]]:
    """Seconds of each kind's rounds -> printed rows: median and quartiles of the ratios to the control, images/s."""
    rows: list[dict[str, Any]] = []
    for kind, values in times.items():
        ratios = [value / other for value, other in zip(values, times[control], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append({"kind": kind, name: round(median, 4), "spread": [round(low, 4), round(high, 4)]})
        rows[-1]["images_per_second"] = round(images / statistics.median(values), 1)
        print(rows[-1], flush=True)
    return rows
