"""How the edge term grows with the batch: time and memory of loss and gradient, against whole matrices.

    python benchmarks/graph.py --json benchmarks/results/graph.json

For each batch B: the edge loss with its gradient as training computes it (in blocks), and the same written with whole
(B, B) matrices, each in a process of its own that reports its peak memory beyond the features; `per_entry_ns` is time
over B²: constant where time grows as b·B·D. The numbers of `inspect-graph` (whole matrices, which it shows) likewise.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WIDTHS = (64, 32)
"""Features of teacher and student."""
LARGEST_WHOLE = 8192


def one(kind: str, batch: int, rounds: int) -> dict[str, Any]:
    """In this process: seconds and MiB."""
    import torch

    from irgdistill.graph import edge_loss, edge_matrix, relation_loss
    from irgdistill.runtime.device import keep_memory

    if kind != "inspect":
        keep_memory(torch.device("cpu"))  # as training does
    torch.manual_seed(0)
    teacher, student = (torch.randn(batch, width) for width in WIDTHS)
    student.requires_grad_()
    edge_loss(student[:64], teacher[:64]).backward()
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(rounds):
        student.grad = None
        started = time.perf_counter()
        if kind == "blocks":
            edge_loss(student, teacher).backward()
        elif kind == "whole":
            relation_loss(edge_matrix(student), edge_matrix(teacher)).backward()
        else:
            from irgdistill.commands.inspect.measures import graph_of, similarity

            graphs = [graph_of({"tap": features.detach()}, "tap", None) for features in (teacher, student)]
            similarity(*graphs, 5)
        times.append(time.perf_counter() - started)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": statistics.median(times), "memory_mib": round(memory, 1), "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", default="256,512,1024,2048,4096,8192,16384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one[0], int(arguments.one[1]), arguments.rounds)))
        return
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        for kind in ("blocks", "whole", "inspect"):
            if kind == "whole" and batch > LARGEST_WHOLE:
                continue
            command = [sys.executable, __file__, "--one", kind, str(batch), "--rounds", str(arguments.rounds)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append({"batch": batch, "kind": kind, **found})
            rows[-1]["per_entry_ns"] = round(1e9 * found["seconds"] / batch**2, 3)
            print(f"{batch:6} {kind:8} {found['seconds']:9.4f} s  {found['memory_mib']:8.1f} MiB", flush=True)
    from record import save

    save(arguments.json, rows, widths=WIDTHS)


if __name__ == "__main__":
    main()
