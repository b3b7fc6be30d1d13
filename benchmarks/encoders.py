"""Every family of encoders in timm as a teacher, with labels and without: two steps by the recipe for encoders.

    python benchmarks/encoders.py --output benchmarks/results/encoders.json

Random weights. A row passes if the losses are finite and the student's first layer gets a gradient in both steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

from irgdistill import Distiller
from irgdistill.errors import UserError
from irgdistill.models import build_network, parameters

FAMILIES = {
    "dinov2": "vit_small_patch14_dinov2",
    "dinov2 with registers": "vit_small_patch14_reg4_dinov2",
    "dinov3": "vit_small_patch16_dinov3",
    "convnext dinov3": "convnext_tiny.dinov3_lvd1689m",
    "siglip": "vit_base_patch16_siglip_224",
    "siglip2": "vit_base_patch32_siglip_256",
    "clip": "vit_base_patch32_clip_224",
    "mae": "vit_base_patch16_224.mae",
    "eva02": "eva02_tiny_patch14_224",
    "aimv2": "aimv2_large_patch14_224",
    "naflex": "naflexvit_base_patch16_siglip",
    "mobileclip": "fastvit_mci0",
    "mobileclip2": "fastvit_mci3",
    "hiera": "hiera_tiny_224",
    "hiera of sam2": "sam2_hiera_tiny",
    "beit": "beit_base_patch16_224",
    "sam": "samvit_base_patch16_224",
}


def two_steps(name: str, labelled: bool, size: int | None) -> str:
    """Train for two steps under random weights of `name` -> "ok", or what went wrong."""
    torch.manual_seed(0)
    teacher = build_network(name, num_classes=0, input_size=None if size is None else (size, size))
    student: Any = timm.create_model("mobilenetv3_small_050", num_classes=3 if labelled else 0)
    distiller = Distiller(teacher.model, student, settings={} if labelled else {"losses.ce.weight": 0})
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    images, labels = torch.rand(2, 3, 96, 96), torch.tensor([0, 1])
    for _ in range(2):
        loss, terms = distiller(images, labels, F.interpolate(images, teacher.input.size))
        loss.backward()
        if not all(value.isfinite() for value in (loss, *terms.values())):
            return f"not finite: {terms}"
        if not student.conv_stem.weight.grad.abs().sum() > 0:
            return "no gradient at the first layer"
        optimizer.step()
        optimizer.zero_grad()
    return "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", help="names, with commas between; the other rows of --output stay")
    parser.add_argument("--input-size", type=int, help="of the teachers, in pixels; default: their own")
    options = parser.parse_args()
    families = FAMILIES | {name: name for name in timm.list_models("*_enc")}
    rows = json.loads(options.output.read_text())["rows"] if options.only and options.output else []
    for family, name in families.items():
        if options.only and name not in options.only.split(","):
            continue
        row: dict[str, Any] = {"family": family, "name": name}
        start = time.perf_counter()
        for labelled in (True, False):
            try:
                row["labels" if labelled else "no labels"] = two_steps(name, labelled, options.input_size)
            except UserError as error:
                row["labels" if labelled else "no labels"] = f"refused: {error}"
            gc.collect()
        row["parameters"] = parameters(build_network(name, num_classes=0, meta=True).model)
        row["seconds"] = round(time.perf_counter() - start, 1)
        if options.input_size is not None:
            row["input_size"] = options.input_size
        rows = [other for other in rows if other["name"] != name] + [row]
        print(json.dumps(row), flush=True)
    if options.output:
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        options.output.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
