"""A training step on the CPU where freed memory is kept, over one where glibc gives it back to the system.

    python benchmarks/pages.py --json benchmarks/results/pages.json          # on an idle machine

Each round runs both in turn, each in a process of its own: the same steps on the same tensors, as in `step.py`.
`over_plain` is the median of the rounds' ratios to the plain allocator, `spread` their quartiles; with them the pages
that the system had to give and to fill with zeros at each step, and the most memory that the process held.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from record import save
from safetensors.torch import save_file
from step import PAIRS, build_network, timed, trainer_of

from irgdistill.runtime import keep_memory


def here(pair: str, method: str, batch: int, steps: int, keep: bool) -> None:
    """Run in the child: one line of JSON."""
    if keep:
        keep_memory(torch.device("cpu"))
    teacher, _, size = PAIRS[pair]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.safetensors"
        save_file(build_network(teacher, num_classes=10).model.state_dict(), weights)
        trainer = trainer_of(pair, method, batch, "cpu", "bf16", weights)
    trainer.components.trained.train()
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, 10, (batch,))
    for _ in range(3):
        trainer.train_step(images, labels)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = [timed(lambda: trainer.train_step(images, labels), trainer.components.device) for _ in range(steps)]
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {"ms": 1e3 * statistics.median(seconds), "pages": (used.ru_minflt - before) / steps}
    print(json.dumps(found | {"peak_gib": used.ru_maxrss / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", default="cifar:128,mobilenet:64,resnet18:64", help="pair:batch, …")
    parser.add_argument("--method", default="irg+kd+at")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("plain", "kept"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    pairs = [(pair, int(batch)) for pair, batch in (item.split(":") for item in arguments.pairs.split(","))]
    if arguments.child:
        here(pairs[0][0], arguments.method, pairs[0][1], arguments.steps, keep=arguments.child == "kept")
        return
    rows = []
    for pair, batch in pairs:
        found: dict[str, list[dict[str, float]]] = {"plain": [], "kept": []}
        for _ in range(arguments.rounds):
            for kind, values in found.items():
                command = [sys.executable, __file__, "--pairs", f"{pair}:{batch}", "--method", arguments.method]
                command += ["--steps", str(arguments.steps), "--child", kind]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                values.append(json.loads(output.splitlines()[-1]))
        ratios = [kept["ms"] / plain["ms"] for kept, plain in zip(found["kept"], found["plain"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        row = {"pair": pair, "batch": batch, "method": arguments.method, "over_plain": round(median, 4)}
        row |= {"spread": [round(low, 4), round(high, 4)], "rounds": arguments.rounds}
        for key in ("pages", "peak_gib"):
            row[key] = {kind: round(statistics.median(v[key] for v in values), 2) for kind, values in found.items()}
        rows.append(row)
        print(row, flush=True)
    save(arguments.json, rows, ("timm",))


if __name__ == "__main__":
    main()
