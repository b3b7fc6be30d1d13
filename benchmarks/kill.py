"""A distillation killed with SIGKILL at random moments and begun or resumed each time, against one never killed.

    python benchmarks/kill.py --work FOLDER --result benchmarks/results/kill.json [--kills 30] [--seed 0]

Every process is a fresh `irgdistill` that leaves marks on its way: step, evaluation, write, rename. Its parent kills it
a random time after a random mark, or after a random time of its start. A run goes on so until it ends; it is then
compared: weights, their metadata, metrics, summary and state, bit for bit, apart from times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

CHILD = """
import os, sys, time
marks = os.open(os.environ["MARKS"], os.O_WRONLY | os.O_APPEND)
mark = lambda name: os.write(marks, f"{time.monotonic()} {name}\\n".encode())
mark("import")
import torch, irgdistill.commands.distill
from support import interruption
from irgdistill.cli import main
mark("build")
interruption.passing(mark)
sys.argv[:1] = ["irgdistill"]
main()
"""
KINDS = {
    "import": "start",
    "build": "start",
    "step": "step",
    "update": "step",
    "evaluate": "evaluation",
    "evaluated batch": "evaluation",
    "write": "save",
    "link": "save",
    "replace": "save",
}


def launch(arguments: list[str], marks: Path, passing: int = 0, after: float | None = None) -> dict[str, Any]:
    """Run `irgdistill` with `arguments`; kill it `after` seconds, counted from the mark number `passing`.

    Returns what it was doing, how it ended, how many marks it left, and the seconds to its first step.
    """
    environment = {**os.environ, "MARKS": str(marks), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    marks.write_text("")
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], env=environment, stderr=output)
        while child.poll() is None and marks.read_text().count("\n") < passing:
            time.sleep(0.002)
        try:
            child.wait(after)
        except subprocess.TimeoutExpired:
            child.kill()
        code = child.wait()
        output.seek(0)
        error = output.read()
    passed = [line.split(" ", 1) for line in marks.read_text().splitlines()]
    return {
        "code": code,
        "marks": len(passed),
        "start_seconds": next((float(at) - began for at, name in passed if name.startswith("step")), None),
        "doing": passed[-1][1] if passed else "import",
        "error": error,
    }


def on_disk(folder: Path) -> dict[str, Any]:
    """Files of the run folder, and where its states stand."""
    from irgdistill.errors import UserError
    from irgdistill.training.state import SavedState

    found: dict[str, Any] = {"files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())}
    for name in ("state", "previous"):
        try:
            found[name] = SavedState.read(folder / "state" / f"{name}.safetensors").position
        except UserError:
            found[name] = None
    return found


def kind(doing: str) -> str:
    """start, step, evaluation, save; between them: what comes after the mark."""
    name, _, side = doing.rpartition(" ")
    name = name if side in ("before", "after") else doing
    return KINDS.get(next((key for key in sorted(KINDS, key=len, reverse=True) if name.startswith(key)), ""), "start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from support.interruption import differences, outcome

    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    marks = args.work / "marks"
    teacher = args.work / "teacher"
    common = ["distill", "--preset", "quickstart", "--device", "cpu", "--input-size", "8", "--teacher-input-size", "8"]
    alone = ["--epochs", "2", "--method", "none", "--student", "cifar_resnet20", "--output", str(teacher)]
    launch([*common, *alone], marks)
    student = [*common, "--epochs", "4", "--student", "cifar_resnet14_x0_5", "--save-every-steps", "2"]
    student += ["--teacher-checkpoint", str(teacher / "best.safetensors"), "--output"]
    whole = launch([*student, str(args.work / "whole")], marks)
    assert whole["code"] == 0, whole["error"]
    expected, start = outcome(args.work / "whole"), whole["start_seconds"]

    chance, kills, runs = random.Random(args.seed), [], []
    while len(kills) < args.kills:
        folder = args.work / f"killed-{len(runs)}"
        count = 0
        result: dict[str, Any] = {"code": 0}
        while not (folder / "summary.json").exists():
            begun = (folder / "state" / "state.safetensors").exists()
            arguments = ["distill", "--resume", str(folder)] if begun else [*student, str(folder)]
            passing, after = 0, None
            if len(kills) < args.kills:
                early = chance.random() < 0.25
                passing = 0 if early else chance.randint(3, whole["marks"] // 5)
                after = chance.uniform(0, start if early else 0.05)
            result = launch(arguments, marks, passing, after)
            start = result["start_seconds"] or start  # other work on the machine changes it
            if result["code"] != -signal.SIGKILL:
                break
            count += 1
            kills.append(
                {
                    "run": len(runs),
                    "command": "resume" if begun else "begin",
                    "mark": passing,
                    "seconds_after": round(after or 0, 4),
                    "doing": result["doing"],
                    "kind": kind(result["doing"]),
                    "on_disk": on_disk(folder),
                }
            )
            print(f"{len(kills):3d}  run {len(runs)}  {kills[-1]['doing']}", flush=True)
        wrong = differences(expected, outcome(folder)) if (folder / "summary.json").exists() else [result["error"]]
        runs.append({"kills": count, "differences": wrong})
        print(f"run {len(runs) - 1}: {count} kills, {wrong or 'the same'}", flush=True)

    import timm
    import torch

    record = {
        "verdict": "equal" if not any(run["differences"] for run in runs) else "different",
        "kills": len(kills),
        "kinds": {name: sum(each["kind"] == name for each in kills) for name in sorted(set(KINDS.values()))},
        "compared": len(expected),
        "runs": runs,
        "each": kills,
        "whole_marks": whole["marks"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "command": f"python benchmarks/kill.py --kills {args.kills} --seed {args.seed}",
    }
    args.result.write_text(json.dumps(record, indent=1) + "\n")
    print(record["verdict"], record["kinds"])


if __name__ == "__main__":
    main()
