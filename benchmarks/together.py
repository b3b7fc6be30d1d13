"""The time of several methods in turns (`compare --together`) over that of the same methods one after the other.

    python benchmarks/together.py --data ./cifar10 --teacher cifar_resnet20 --student cifar_resnet14_x0_5 \
        --json benchmarks/results/together.json

Networks have random weights. Rounds take the processor's time for `--steps` batches of every method, both ways in an
order that changes; the first round is not counted. `over_single` is the median of the rounds' ratios, `spread` their
least and largest.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from record import save

from irgdistill.config import load_config
from irgdistill.io import Report, RunFolder
from irgdistill.training import Setup, SharedParts, Trainer, Turns, build_trainer, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--teacher", default="cifar_resnet20")
    parser.add_argument("--student", default="cifar_resnet14_x0_5")
    parser.add_argument("--input-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--methods", default="none,kd,dkd,dist,kd+at,irg+kd+at")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    flags = {
        "student.name": arguments.student, "student.input_size": arguments.input_size, "data.source": arguments.data,
        "data.workers": 0, "data.batch_size": arguments.batch_size, "runtime.amp": "none", "optim.lr": 1e-6,
        "schedule.epochs": 1000, "teacher.name": arguments.teacher,
    }  # fmt: skip
    methods = sorted(arguments.methods.split(","), key=lambda name: name == "none")  # those with a teacher first
    configs = [load_config(flags={**flags, "method": name}) for name in methods]
    setups = [[prepare(config, fetch=False) for config in configs] for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        ways = {"single": single(setups[0], Path(folder)), "together": together(setups[1], Path(folder))}
        times = measure(ways, arguments.rounds, arguments.steps)
    ratios = [a / b for a, b in zip(times["together"], times["single"], strict=True)]
    row = {
        "methods": len(methods),
        "milliseconds_single": round(1000 * statistics.median(times["single"]) / arguments.steps, 1),
        "milliseconds_together": round(1000 * statistics.median(times["together"]) / arguments.steps, 1),
        "over_single": round(statistics.median(ratios), 3),
        "spread": [round(f(ratios), 3) for f in (min, max)],
    }
    print(json.dumps(row, indent=1))
    about = {key: value for key, value in vars(arguments).items() if key != "json"}
    save(arguments.json, [row], **{**about, "data": Path(arguments.data).name})


def trainer(setup: Setup, folder: Path, shared: SharedParts | None = None) -> Trainer:
    return build_trainer(setup, RunFolder(folder / "run"), Report(quiet=True), shared=shared)


def endless(run: Trainer) -> Iterator[None]:
    """Batches of all epochs, without evaluation."""
    while True:
        yield from run.epoch_steps()
        run.progress.epoch, run.progress.batch = run.progress.epoch + 1, 0


def single(setups: list[Setup], folder: Path) -> Callable[[int], None]:
    """Trains each run on so many batches, one run after the other."""
    runs = [endless(trainer(setup, folder)) for setup in setups]

    def train(steps: int) -> None:
        for run in runs:
            for _ in range(steps):
                next(run)

    return train


def together(setups: list[Setup], folder: Path) -> Callable[[int], None]:
    """Trains all runs on so many batches, in turns."""
    shared = SharedParts()
    trainers = [trainer(setup, folder, shared) for setup in setups]
    for run in trainers:
        run.steps = lambda run=run: endless(run)  # type: ignore[method-assign]
    turns = [Turns(run, shared) for run in trainers]

    def train(steps: int) -> None:
        for _ in range(steps):
            for run in turns:
                run.take()

    return train


def measure(ways: dict[str, Callable[[int], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Processor seconds of each way in each round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(ways), len(ways)):
            since = time.process_time()
            ways[name](steps)
            if number:
                times[name].append(time.process_time() - since)
    return times


if __name__ == "__main__":
    main()
