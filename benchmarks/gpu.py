"""All that only a GPU can tell, in one command: tests, speed, memory, resuming, some real training.

    python benchmarks/gpu.py --json $OUT/gpu-1.json --parts tests,resume,step        # a call of ten minutes each
    python benchmarks/gpu.py --json $OUT/gpu-2.json --parts images,edges,cache,train
    python benchmarks/gpu.py --tiny --device cpu                                     # does it all still run? (CI)

Each part runs in a process of its own, with its own limit, and is written to the JSON as soon as it ends; a part that
fails or takes too long says so there and costs the others nothing. `gpu_pack.py` makes the folder that `train` needs.
At the end the rows for the table of docs/speed.md are printed.

    tests    the tests marked `gpu`
    resume   a run killed in its second epoch and resumed, under deterministic algorithms: differs in no bit?
    step     `step.py`: the step over the floor, three pairs, batch 128 and 512; eager, compiled, CUDA graphs
    images   images/s of resnet50 -> mobilenetv2_100 at 224 px, tool beside bare loops
    edges    seconds and peak memory of the edge loss with its gradient, up to 65,536 images
    cache    `cache.py`: the loader, and an epoch from a cache, live and alone
    train    as many epochs of the preset `cifar100-standard` as fit, two pairs
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
STUDENT, TEACHER = "cifar_resnet14_x0_5", "cifar_resnet20"


def irgdistill(*words: object, limit: float | None = None, stop: bool = False) -> tuple[int, str]:
    """Exit code and stderr of the command; with `stop` it gets SIGTERM at the limit, and saves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "irgdistill", *map(str, words)], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        _, text = process.communicate(timeout=limit)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM if stop else signal.SIGKILL)
        return 143, process.communicate()[1]


# --- parts: each takes the arguments and returns its rows -------------------------------------------------------------


def tests(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/system/test_gpu.py", "-p", "no:cacheprovider"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return [{"code": done.returncode, "summary": done.stdout.strip().splitlines()[-1], "failed": failed}]


def resume(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "tests"))
    from support.interruption import differences, outcome, run_jobs

    with tempfile.TemporaryDirectory() as work:
        words = [
            *("distill", "--data", "digits", "--student", STUDENT, "--epochs", "2", "--device", arguments.device),
            *("--workers", "0", "--set", "runtime.deterministic=true", "--set", "data.train_images=256"),
            *("--save-every-steps", "1", "--method", "none", "--batch-size", "64", "--input-size", "32"),
        ]
        whole, cut = Path(work, "whole"), Path(work, "cut")
        jobs: list[dict[str, Any]] = [
            {"arguments": [*words, "--output", str(whole)]},
            {
                "arguments": [*words, "--output", str(cut)],
                "at": "update before",
                "nth": 6,
                "signal": 9,
            },
            {"arguments": ["distill", "--resume", str(cut)]},
        ]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        codes = []
        for job in jobs:
            if arguments.device == "cpu":
                codes += [code for code, _ in run_jobs([job])]
            else:  # in a process of its own, which may use the GPU
                codes.append(_interrupted(job, visible))
        return [{"codes": codes, "differences": differences(outcome(whole), outcome(cut))}]


def _interrupted(job: dict[str, Any], visible: str | None) -> int:
    code = (
        "import json, sys; sys.path.insert(0, 'tests'); from support.interruption import _run_here; "
        "raise SystemExit(_run_here(json.loads(sys.argv[1])))"
    )
    environment = {**os.environ, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})}
    return subprocess.run([sys.executable, "-c", code, json.dumps(job)], cwd=ROOT, env=environment).returncode


def step(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from step import measure

    from irgdistill.runtime import compiler_settings

    if arguments.tiny:
        return measure("cifar", 8, ["irg+kd"], arguments.device, "none", 2)
    rows = []
    methods = ["kd", "irg", "irg+kd", "irg+kd+at"]
    modes = [("eager", False, "default"), ("compiled", True, "default"), ("graphs", True, "reduce-overhead")]
    for name, compiled, mode in modes:
        for pair in ("cifar", "mobilenet", "resnet18"):
            for batch in (128, 512):
                with compiler_settings(compiled):
                    found = measure(pair, batch, methods, arguments.device, "bf16", 15, compiled, mode)
                rows += [{**row, "mode": name} for row in found]
                _save_partly(arguments, rows)
    return rows


def images(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from step import measure

    pair, batch = ("cifar", 8) if arguments.tiny else ("mobilenet", 256)
    amp = "none" if arguments.tiny else "bf16"
    rows = measure(pair, batch, ["irg+kd"], arguments.device, amp, 2 + arguments.rounds)
    return [{**row, "images_per_second": round(1000 * batch / row["ms"], 1)} for row in rows]


def edges(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from irgdistill.graph import edge_loss

    device = torch.device("cuda" if arguments.device == "auto" and torch.cuda.is_available() else arguments.device)
    device = torch.device("cpu") if device.type == "auto" else device
    rows = []
    for count in (256, 1024) if arguments.tiny else (1024, 4096, 16384, 65536):
        teacher, student = (torch.randn(count, width, device=device) for width in (64, 32))
        student.requires_grad_()
        times, peak = [], 0
        for _ in range(4):
            student.grad = None
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            since = time.perf_counter()
            edge_loss(student, teacher).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated()
            times.append(time.perf_counter() - since)
        rows.append({"images": count, "seconds": round(min(times[1:]), 6), "peak_mib": round(peak / 2**20, 1)})
    return rows


def cache(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from cache import main as measure
    from safetensors.torch import save_file

    from irgdistill.models import build_network

    data, classes, count = packed(arguments)
    with tempfile.TemporaryDirectory() as work:
        weights, found = Path(work, "teacher.safetensors"), Path(work, "cache.json")
        save_file(build_network(TEACHER, num_classes=classes).model.state_dict(), weights)
        words = [
            *("--data", data, "--teacher", TEACHER, "--teacher-checkpoint", weights, "--student", STUDENT),
            *("--images", min(256 if arguments.tiny else 20_000, count), "--rounds", 2 if arguments.tiny else 5),
            *("--workers", 0 if arguments.tiny else 8, "--batch-size", 64 if arguments.tiny else 128),
            *("--amp", "none" if arguments.tiny else "bf16", "--device", arguments.device, "--json", found),
        ]
        measure([*map(str, words)])
        rows: list[dict[str, Any]] = json.loads(found.read_text())["rows"]
    return rows


def packed(arguments: argparse.Namespace) -> tuple[str, int, int]:
    """Data, classes and training images: those of the pack, or the digits for a tiny run without one."""
    path = arguments.pack / "data.tar"
    if arguments.tiny and not path.exists():
        return "digits", 10, 1000
    with tarfile.open(path) as tar:
        names = [name.split("/") for name in tar.getnames() if name.startswith("train/")]
    return str(path), len({name[1] for name in names}), len(names)


PAIRS = (("cifar_resnet56", "cifar_resnet20"), ("cifar_resnet32x4", "cifar_resnet8x4"))


def train(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows, (data, classes, _) = [], packed(arguments)
    preset = "quickstart" if data == "digits" else "cifar100-standard"
    for teacher, student in PAIRS[:1] if arguments.tiny else PAIRS:
        weights = arguments.pack / f"{teacher}.safetensors"
        given = ["--teacher", teacher, "--teacher-checkpoint", weights]
        if arguments.tiny or not weights.exists():
            given = ["--method", "none"]
        with tempfile.TemporaryDirectory() as work:
            words = ["distill", "--preset", preset, "--student", STUDENT if arguments.tiny else student, *given]
            words += ["--output", f"{work}/run", "--device", arguments.device]
            words += ["--data", data, "--workers", 0 if arguments.tiny else 8]
            words += ["--epochs", 1, "--set", f"data.train_images={max(classes, 128)}"] if arguments.tiny else []
            code, text = irgdistill(*words, limit=arguments.limit / (1 if arguments.tiny else 2) - 20, stop=True)
            path = Path(work, "run/metrics.jsonl")
            records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        evaluated = [record for record in records if record["kind"] == "eval"]
        trained = [record["images_per_second"] for record in records if record["kind"] == "train"]
        rows.append({"pair": f"{teacher} -> {student}", "given": given[0] == "--teacher", "code": code})
        rows[-1] |= {"epochs": len(evaluated), "top1": [record["top1"] for record in evaluated]}
        rows[-1] |= {"images_per_second": trained[-1] if trained else None, "end": text.strip()[-200:]}
    return rows


Part = Callable[[argparse.Namespace], list[dict[str, Any]]]
PARTS: dict[str, tuple[Part, int]] = {
    "tests": (tests, 120),
    "resume": (resume, 90),
    "step": (step, 360),
    "images": (images, 90),
    "edges": (edges, 60),
    "cache": (cache, 120),
    "train": (train, 300),
}
"""Each part with its limit in seconds: two calls of less than ten minutes."""


# --- the parts in turn ------------------------------------------------------------------------------------------------


def _save_partly(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if arguments.one_json is not None:
        arguments.one_json.write_text(json.dumps(rows))


def _run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One part in a process of its own -> its rows, seconds, and an error if it failed."""
    limit, since = min(PARTS[name][1], arguments.limit or PARTS[name][1]), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "rows.json")
        words = [sys.executable, __file__, "--one", name, "--one-json", found, "--limit", limit]
        words += ["--device", arguments.device, "--pack", arguments.pack, "--rounds", arguments.rounds]
        words += ["--tiny"] if arguments.tiny else []
        process = subprocess.Popen(
            list(map(str, words)),
            stderr=subprocess.PIPE,
            stdout=sys.stderr,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},  # the package beside this file
        )
        error = None
        try:
            _, text = process.communicate(timeout=limit)
            if process.returncode:
                error = text[-2000:]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            error = f"took more than {limit} s"
        rows = json.loads(found.read_text()) if found.exists() else []
    result = {"rows": rows, "seconds": round(time.perf_counter() - since, 1)}
    return result if error is None else {**result, "error": error}


def table(parts: dict[str, Any], device: str) -> str:
    """The rows of the table in docs/speed.md: feature, device, date, what was found."""
    lines = []
    for name, part in parts.items():
        state = part["error"].strip().splitlines()[-1] if "error" in part else f"{len(part['rows'])} rows"
        lines.append(f"| {name} | {device} | {date.today()} | {state}, {part['seconds']} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pack", type=Path, default=Path("gpu-pack"), help="what gpu_pack.py wrote")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, help="most seconds of any part")
    parser.add_argument("--tiny", action="store_true", help="sizes that show only that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--one-json", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.rounds = 0
    if arguments.one:
        rows = PARTS[arguments.one][0](arguments)
        arguments.one_json.write_text(json.dumps(rows))
        return
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown parts: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    from record import save

    parts: dict[str, Any] = {}
    for name in names:
        parts[name] = _run(name, arguments)
        save(arguments.json, [], ("timm",), parts=parts, date=str(date.today()), device=arguments.device)
        print(f"{name}: {parts[name].get('error', 'done')} ({parts[name]['seconds']} s)", file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if arguments.device != "cpu" and torch.cuda.is_available() else "CPU"
    print(table(parts, device))
    sys.exit(any("error" in part for part in parts.values()))


if __name__ == "__main__":
    main()
