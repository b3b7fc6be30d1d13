"""Student alone against the student distilled, method by method, on one schedule and seed; runs what is missing.

    python benchmarks/comparison.py --data CIFAR --teacher cifar_resnet20 --teacher-checkpoint FILE \
        --student cifar_resnet20_x0_5 --runs FOLDER --result benchmarks/results/NAME.json [-- further distill options]

Interrupted, it goes on where it stopped. The result holds the command, versions, every method's weights and numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def distill(folder: Path, options: list[str]) -> None:
    """Run, resume or skip one method."""
    command = ["irgdistill", "distill"]
    if (folder / "summary.json").exists():
        return
    if (folder / "state" / "state.safetensors").exists():
        command += ["--resume", str(folder)]
    else:
        command += ["--output", str(folder), "--overwrite", *options]
    subprocess.run(command, check=True)


def row(folder: Path, method: str, against: list[str]) -> dict[str, Any]:
    """Numbers of one finished run."""
    command = ["irgdistill", "eval", str(folder), "--json", *against]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    summary = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "method": method,
        "top1_best": summary["top1"],
        "top1_last": summary["last_top1"],
        "top5": result["top5"],
        "agreement": result["agreement"],
        "kl": result["kl"],
        "seconds": round(summary["seconds"]),
        "images_per_second": round(summary["images_per_second"]),
        "gradient_share": [r["share"] for r in records if r["kind"] == "gradient"][-1:],
        "curve": [r["top1"] for r in records if r["kind"] == "eval"],
    }


def paired_differences(folders: dict[str, Path], baseline: str = "none") -> dict[str, dict[str, float]]:
    """Difference in top-1 from the baseline, last epoch, with the half-width of its 95 % interval over the images."""
    import torch

    from irgdistill.checkpoint import restore
    from irgdistill.config import DataConfig
    from irgdistill.data import BadImages, eval_loader
    from irgdistill.sources import open_splits
    from irgdistill.taps import Tapped

    networks = {}
    for method, folder in folders.items():
        network, metadata = restore(folder / "last.safetensors")
        networks[method] = Tapped(network.model, network.view()).eval()
    data = DataConfig.model_validate(metadata["data"])
    how = network.size, network.interpolation, network.crop_pct
    loader = eval_loader(open_splits(data, val_only=True), data, *how, torch.device("cpu"), BadImages(0))
    right: dict[str, list[torch.Tensor]] = {method: [] for method in folders}
    with torch.no_grad():
        for images, labels in loader.epoch():
            for method, network in networks.items():
                right[method].append((network(images).logits.argmax(1) == labels).double())
    percent = {method: 100 * torch.cat(parts) for method, parts in right.items()}
    result = {}
    for method, values in percent.items():
        difference = values - percent[baseline]
        half = 1.96 * float(difference.std()) / len(difference) ** 0.5
        result[method] = {"from_none": round(float(difference.mean()), 2), "half_width_95": round(half, 2)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--teacher-checkpoint", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--device", default=platform.machine(), help="what it ran on, for the record")
    parser.add_argument("--methods", default="none,kd,irg,irg+kd")
    parser.add_argument("options", nargs="*", help="further options of `irgdistill distill`, after --")
    args = parser.parse_args()
    teacher = ["--teacher", args.teacher, "--teacher-checkpoint", args.teacher_checkpoint]
    against = ["--against", args.teacher, "--against-checkpoint", args.teacher_checkpoint]
    rows, folders = [], {}
    for method in args.methods.split(","):
        folder = folders[method] = args.runs / method.replace("+", "-")
        distill(
            folder,
            ["--student", args.student, "--data", args.data, "--method", method, *teacher, *args.options],
        )
        rows.append(row(folder, method, against))
        print(f"{method:8s} top-1 last {rows[-1]['top1_last']:.2f}  best {rows[-1]['top1_best']:.2f}", flush=True)
    if "none" in folders:
        for method, difference in paired_differences(folders).items():
            next(row for row in rows if row["method"] == method).update(difference)
    import timm
    import torch

    result = {
        "rows": rows,
        "teacher": args.teacher,
        "student": args.student,
        "options": args.options,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": f"{args.device}, torch with {torch.get_num_threads()} thread(s)",
        "command": "python benchmarks/comparison.py "
        + " ".join(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]),
    }
    args.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
