"""The step with one teacher and with two, live and from caches, against that of the student alone.

    python benchmarks/several.py --student cifar_resnet20_x0_5 --teachers cifar_resnet56,cifar_resnet20 \
        --json benchmarks/results/several.json

Networks have random weights, the images are the handwritten digits. Rounds take the processor's time for `--steps`
steps of each case, in an order that changes; the first round is not counted. `over_alone` is the median of the rounds'
ratios, `spread` their least and largest.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import save

from irgdistill.commands.cache_teacher import cache_teacher
from irgdistill.commands.requests import CacheRequest
from irgdistill.config import load_config
from irgdistill.io import Report, RunFolder, save_tensors
from irgdistill.models import build_network, describe
from irgdistill.training import build_trainer, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default="cifar_resnet20_x0_5")
    parser.add_argument("--teachers", default="cifar_resnet56,cifar_resnet20")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--method", default="irg+kd+at")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    common = {
        "student.name": arguments.student, "student.input_size": 32, "data.source": "digits", "data.workers": 0,
        "data.batch_size": arguments.batch_size, "data.views": 1, "data.view_seed": 0, "runtime.amp": "none",
        "schedule.epochs": 1000, "optim.lr": 1e-6,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            {"checkpoint": weights(name, Path(folder)), "cache": Path(folder) / f"cache-{name}"}
            for name in arguments.teachers.split(",")
        )
        for teacher in (first, second):
            config = load_config(
                flags={**common, "teacher.checkpoint": teacher["checkpoint"], "data.views": None, "method": "irg+kd+at"}
            )
            cache_teacher(CacheRequest(config, teacher["cache"]))
        cases: dict[str, dict[str, Any]] = {"alone": {"method": "none"}}
        for kind, key in (("live", "checkpoint"), ("cached", "cache")):
            one = {"method": arguments.method, f"teacher.{key}": first[key]}
            cases |= {f"one {kind}": one, f"two {kind}": {**one, f"teachers.0.{key}": second[key]}}
        cases["one live, one cached"] = {**cases["one live"], "teachers.0.cache": second["cache"]}
        steps = {name: stepper({**common, **case}, Path(folder) / "run") for name, case in cases.items()}
        times = measure(steps, arguments.rounds, arguments.steps)
    rows = []
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times["alone"], strict=True)]
        row = {"case": name, "milliseconds": round(1000 * statistics.median(found) / arguments.steps, 1)}
        row |= {"over_alone": round(statistics.median(ratios), 2), "spread": [round(f(ratios), 2) for f in (min, max)]}
        rows.append(row)
    print(json.dumps(rows, indent=1))
    save(arguments.json, rows, **{key: value for key, value in vars(arguments).items() if key != "json"})


def weights(name: str, folder: Path) -> Path:
    """A checkpoint with random weights for the ten digits."""
    network = build_network(name, num_classes=10, input_size=(32, 32))
    path = folder / f"{name}.safetensors"
    save_tensors(path, dict(network.model.state_dict()), describe(network, [str(i) for i in range(10)]))
    return path


def stepper(flags: dict[str, Any], folder: Path) -> Callable[[], Any]:
    """A training step on one batch, which is loaded before."""
    trainer = build_trainer(prepare(load_config(flags=flags)), RunFolder(folder), Report(quiet=True))
    trainer.components.trained.train()
    images, labels, *cached = next(iter(trainer.components.train.epoch()))
    return lambda: trainer.train_step(images, labels, *cached)


def measure(steps: dict[str, Callable[[], Any]], rounds: int, count: int) -> dict[str, list[float]]:
    """Case -> the seconds of `count` steps in each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in random.sample(list(steps), len(steps)):
            started = time.process_time()
            for _ in range(count):
                steps[name]()
            if number:
                times[name].append(time.process_time() - started)
    return times


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
