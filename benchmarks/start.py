"""From the command to the first update, and to the help, in seconds; beside them the bare interpreter and the imports.

    python benchmarks/start.py --data ./cifar10 --teacher-checkpoint FILE --json benchmarks/results/start.json

Every round runs each command once, in turn, in a process of its own. The run is that of the preset cifar10-small
without a check of the teacher; its first update is done when the first record of kind `train` is in metrics.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import save

PYTHON = (sys.executable, "-c")
QUICK = {
    "interpreter": (*PYTHON, "pass"),
    "--help": (sys.executable, "-m", "irgdistill", "distill", "--help"),
    "import torch, timm": (*PYTHON, "import torch, timm"),
}


def to_end(command: tuple[str, ...]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def to_first_update(data: str, teacher: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        options = ["--preset", "cifar10-small", "--data", data, "--teacher-checkpoint", str(teacher)]
        options += ["--skip-teacher-check", "--set", "runtime.log_every=1", "--output", str(metrics.parent)]
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "irgdistill", "distill", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            if process.poll() is not None:
                raise SystemExit(f"distill ended with code {process.returncode} before its first update")
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.kill()
        process.wait()
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher-checkpoint", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, command in QUICK.items():
            seconds.setdefault(name, []).append(to_end(command))
        seconds.setdefault("first update", []).append(to_first_update(arguments.data, arguments.teacher_checkpoint))
    rows = [
        {
            "what": name,
            "seconds": round(statistics.median(values), 3),
            "spread": [round(min(values), 3), round(max(values), 3)],
        }
        for name, values in seconds.items()
    ]
    for row in rows:
        print(f"{row['what']:20} {row['seconds']:7.3f} s  {row['spread']}")
    save(arguments.json, rows, ("timm",), rounds=arguments.rounds)


if __name__ == "__main__":
    main()
