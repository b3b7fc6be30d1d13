"""An epoch from a teacher cache, and one under the live teacher, against plain supervised training of the same student.

    python benchmarks/cache.py --data ./cifar10 --teacher cifar_resnet20 --teacher-checkpoint FILE \
        --student cifar_resnet20_x0_5 --images 10000 --json benchmarks/results/cache.json

All three train on the same views, in the same order, through the same loader, which is also run alone. Each round runs
an epoch of each, in an order that changes; the first one, which fills the memory with decoded images, is not counted.
`over_plain` is the median of the rounds' ratios of whole epochs (loading, step, logging; no evaluation).
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from record import epoch_rows, save

from irgdistill.commands.cache_teacher import cache_teacher
from irgdistill.commands.requests import CacheRequest
from irgdistill.config.loading import load_config
from irgdistill.io.console import Report
from irgdistill.io.run_folder import RunFolder
from irgdistill.training.setup import prepare
from irgdistill.training.trainer import build_trainer


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("data", "teacher", "teacher-checkpoint", "student"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--method", default="irg+kd+at")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="all three compiled, plain training too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    teacher = {"teacher.name": arguments.teacher, "teacher.checkpoint": arguments.teacher_checkpoint}
    common = {
        "student.name": arguments.student, "data.source": arguments.data, "data.train_images": arguments.images,
        "data.batch_size": arguments.batch_size, "data.workers": arguments.workers, "data.views": 1,
        "data.view_seed": 0, "runtime.amp": arguments.amp, "runtime.channels_last": True, "schedule.epochs": 1000,
        "optim.lr": 0.01, "runtime.compile": arguments.compile, "runtime.device": arguments.device,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        started = time.perf_counter()
        cache_teacher(CacheRequest(load_config(flags={**common, **teacher, "data.views": None}), cache))
        caching = time.perf_counter() - started
        size = sum(path.stat().st_size for path in cache.iterdir())
        kinds: dict[str, dict[str, Any]] = {
            "plain": {"method": "none"},
            "cached": {"method": arguments.method, "teacher.cache": cache},
            "live": {"method": arguments.method, **teacher},
        }
        trainers = {}
        for kind, flags in kinds.items():
            config = load_config(flags={**common, **flags})
            run = RunFolder(Path(folder) / kind)
            trainers[kind] = build_trainer(prepare(config), run, Report(quiet=True))
        order = ["loader", *trainers]
        times: dict[str, list[float]] = {kind: [] for kind in order}
        for number in range(arguments.rounds + 1):
            random.Random(number).shuffle(order)
            for kind in order:
                trainer = trainers.get(kind, trainers["plain"])
                progress = trainer.progress
                progress.epoch, progress.batch, progress.sums = number, 0, {}
                started = time.perf_counter()
                if kind == "loader":
                    for _ in trainer.components.train.epoch(number):
                        pass
                else:
                    trainer.train_epoch()
                if number:
                    times[kind].append(time.perf_counter() - started)
    about = {
        key: str(value) for key, value in vars(arguments).items() if key not in ("json", "data", "teacher_checkpoint")
    }
    about |= {"caching_seconds": round(caching, 1), "cache_mib": round(size / 2**20, 2)}
    save(arguments.json, epoch_rows(times, "plain", "over_plain", arguments.images), **about)


if __name__ == "__main__":
    main()
