"""What many processes cost: the gather, the sharded edge rows, and training with one process or two.

    python benchmarks/ranks.py --json benchmarks/results/ranks.json      # on an idle machine with two cores

All on the CPU with gloo. **Relations**: time of the edge term (gather, own rows, backward) on pooled features of
64 values for global batches of 256, 2,048 and 16,384 images, in one process with all rows and in two with half of
them each, against a step of the student `cifar_resnet20_x0_5` under `cifar_resnet20`, timed at 256 images in the
same processes and scaled to the batch (a step of 16,384 does not fit the memory). `extra_mib` is what the process grew
by in the term. **Images/s**: the trainer's own step, one process with two threads against two with one each, and
one with one; in turn, several rounds; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from irgdistill.config.loading import load_config
from irgdistill.graph import edge_loss
from irgdistill.io.console import Report
from irgdistill.io.run_folder import RunFolder
from irgdistill.models.build import build_network
from irgdistill.runtime.distributed import World, process_group
from irgdistill.training.setup import prepare
from irgdistill.training.trainer import Trainer, build_trainer

TEACHER, STUDENT, WIDTH, STEP_BATCH = "cifar_resnet20", "cifar_resnet20_x0_5", 64, 256


def _one(rank: int, size: int, threads: int, port: int, queue: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(threads)
    with process_group("cpu", "gloo") as world:
        queue.put((rank, function(world, *args)))


def in_ranks(size: int, threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """What `function(world, *args)` gives in the first of `size` processes."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    queue = context.Queue()
    processes = [
        context.Process(target=_one, args=(rank, size, threads, port, queue, function, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return found[0]


def trainer(world: World, batch: int, folder: Path) -> Trainer:
    flags = {
        "student.name": STUDENT,
        "teacher.name": TEACHER,
        "teacher.checkpoint": str(folder / "teacher.safetensors"),
        "data.source": "digits",
        "data.batch_size": batch,
        "runtime.gradient_shares_every": 0,
        "runtime.device": "cpu",
        "runtime.amp": "bf16",
        "runtime.channels_last": True,
    }
    run = RunFolder(folder / str(world.rank))
    made = build_trainer(prepare(load_config(flags=flags)), run, Report(quiet=True), world)
    made.components.trained.train()
    return made


def seconds(run: Callable[[], object], world: World, rounds: int) -> float:
    """Median over rounds of the slowest process."""
    times = []
    for number in range(rounds + 1):
        world.sum(torch.zeros(()))  # a barrier
        started = time.perf_counter()
        run()
        taken = torch.tensor(time.perf_counter() - started)
        if number:
            times.append(float(world.maximum(taken)))
    return statistics.median(times)


def step_seconds(world: World, batch: int, rounds: int, folder: Path) -> float:
    made = trainer(world, batch, folder)
    images = torch.randint(0, 256, (batch // world.size, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (batch // world.size,))
    return seconds(lambda: made.train_step(images, labels), world, rounds)


def relations(world: World, batches: list[int], rounds: int, folder: Path) -> list[dict[str, Any]]:
    step = step_seconds(world, STEP_BATCH, rounds, folder)
    rows = []
    for batch in batches:
        own = batch // world.size
        student, teacher = torch.randn(own, WIDTH, requires_grad=True), torch.randn(own, WIDTH)

        def gather(student: torch.Tensor = student, teacher: torch.Tensor = teacher) -> None:
            (world.gather(student).sum() + world.gather(teacher).sum()).backward()

        def term(student: torch.Tensor = student, teacher: torch.Tensor = teacher, own: int = own) -> None:
            edge_loss(world.gather(student), world.gather(teacher), world.rows(own), world.maximum).backward()

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = {
            "global_batch": batch,
            "ranks": world.size,
            "gather_ms": round(1000 * seconds(gather, world, rounds), 2),
            "term_ms": round(1000 * seconds(term, world, rounds), 2),
            "step_ms": round(1000 * step * batch / STEP_BATCH, 1),
        }
        row["gather_share"] = round(row["gather_ms"] / row["step_ms"], 5)
        row["term_share"] = round(row["term_ms"] / row["step_ms"], 5)
        row["extra_mib"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        row["matrix_mib"] = round(own * batch * 4 / 2**20, 1)
        rows.append(row)
    return rows


def throughput(rounds: int, folder: Path) -> dict[str, Any]:
    forms = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1), "1 process, 1 thread": (1, 1)}
    found: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, (size, threads) in forms.items():
            found[name].append(STEP_BATCH / in_ranks(size, threads, step_seconds, STEP_BATCH, 8, folder))
    medians = {name: statistics.median(values) for name, values in found.items()}
    control = medians["1 process, 2 threads"]
    return {
        name: {
            "images_per_second": round(medians[name], 1),
            "range": [round(min(values), 1), round(max(values), 1)],
            "ratio": round(medians[name] / control, 3),
        }
        for name, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 2048, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = build_network(TEACHER, num_classes=10).model.state_dict()
        save_file(weights, folder / "teacher.safetensors")
        rows = []
        for size in (1, 2):
            rows += in_ranks(size, 1, relations, args.batches, args.rounds, folder)
        for row in rows:
            print(json.dumps(row), flush=True)
        speeds = throughput(args.rounds, folder)
    print(json.dumps(speeds, indent=1))
    if args.json:
        result = {
            "rows": rows,
            "images_per_second": speeds,
            "pair": [TEACHER, STUDENT],
            "features": WIDTH,
            "device": f"{platform.machine()}, {os.cpu_count()} cores, gloo",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "command": "python benchmarks/ranks.py",
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
