"""What one distillation step costs over the floor: the student's own step and one forward of the teacher.

    python benchmarks/step.py --json benchmarks/results/step.json          # on an idle machine
    python benchmarks/step.py --pairs cifar --rounds 5                      # a quick look

On the same tensors, in turn, in an order that changes with every round:
    student      forward, cross-entropy, backward, optimizer: a bare loop of the student alone
    floor        the same and the teacher's forward, as the tool runs it (batch norms folded), in inference mode
    plain-floor  the same with the teacher as it is, under no_grad
    METHOD       `Trainer.train_step`
`over_floor` is the median of the rounds' ratios to the floor of the same round, `spread` their quartiles.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import save
from safetensors.torch import save_file
from torch import Tensor

from irgdistill.config.loading import load_config
from irgdistill.io.console import Report
from irgdistill.io.run_folder import RunFolder
from irgdistill.matching.taps import Tapped
from irgdistill.models.build import build_network
from irgdistill.runtime import compiler_settings
from irgdistill.training.setup import prepare
from irgdistill.training.trainer import Trainer, build_trainer

PAIRS = {
    "cifar": ("cifar_resnet20", "cifar_resnet20_x0_5", 32),
    "cifar56": ("cifar_resnet56", "cifar_resnet20", 32),
    "mobilenet": ("resnet50", "mobilenetv2_100", 224),
    "resnet18": ("vit_small_patch16_224", "resnet18", 224),
}
METHODS = ("none", "kd", "irg", "mtk", "irg+kd", "kd+at", "irg+kd+at", "rkd", "sp", "pkt", "at", "fitnet", "fsp", "dkd")
METHODS += ("positions", "dist", "wttm", "srd", "crd", "reviewkd")
Step = Callable[[], object]


def trainer_of(
    pair: str,
    method: str,
    batch: int,
    device: str,
    amp: str,
    weights: Path,
    compiled: bool = False,
    mode: str = "default",
) -> Trainer:
    """The tool's own trainer of this method."""
    teacher, student, size = PAIRS[pair]
    flags = {
        "method": method, "teacher.name": teacher, "teacher.checkpoint": weights, "student.name": student,
        "student.input_size": size, "data.source": "digits", "data.val_fraction": 0.1, "data.batch_size": batch,
        "data.workers": 0, "optim.lr": 1e-3, "runtime.device": device, "runtime.amp": amp,
        "runtime.channels_last": True, "runtime.gradient_shares_every": 0, "runtime.compile": compiled,
        "runtime.compile_mode": mode,
    }  # fmt: skip
    config = load_config(flags={name: value for name, value in flags.items() if value is not None})
    return build_trainer(prepare(config), RunFolder(Path(tempfile.mkdtemp())), Report(quiet=True))


def bare(trainer: Trainer, teacher: Tapped | None, images: Tensor, labels: Tensor, mode: Any) -> Step:
    """A loop without the tool: one student, and one forward of the teacher."""
    student, optimizer = trainer.components.evaluated, trainer.components.optimizer

    def step() -> None:
        with trainer.components.autocast:
            if teacher is not None:
                with mode():
                    teacher(images)
            logits = student(images).logits
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(
    pair: str,
    batch: int,
    methods: list[str],
    device: str,
    amp: str,
    rounds: int,
    compiled: bool = False,
    compile_mode: str = "default",
) -> list[dict[str, Any]]:
    teacher, _, size = PAIRS[pair]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.safetensors"
        torch.manual_seed(0)
        network = build_network(teacher, num_classes=10)
        save_file(network.model.state_dict(), weights)
        options = (batch, device, amp, weights, compiled, compile_mode)
        trainers = {method: trainer_of(pair, method, *options) for method in methods}
        alone = trainer_of(pair, "none", *options)
        floored = trainer_of(pair, "kd", *options)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(alone.components.device)
    labels = torch.randint(0, 10, (batch,)).to(alone.components.device)
    network.model.to(alone.components.device, memory_format=torch.channels_last)
    plain = (
        Tapped(network.model, network.preprocess().to(alone.components.device), (), True).requires_grad_(False).eval()
    )
    steps: dict[str, Step] = {
        "student": bare(alone, None, images, labels, torch.no_grad),
        "floor": bare(floored, floored.components.teacher.network, images, labels, torch.inference_mode),
        "plain-floor": bare(floored, plain, images, labels, torch.no_grad),
    }
    for method, trainer in trainers.items():
        trainer.components.trained.train()
        steps[method] = lambda trainer=trainer: trainer.train_step(images, labels)  # type: ignore[misc]
    for step in (*steps.values(), *steps.values()):
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            times[name].append(timed(steps[name], alone.components.device))
    rows = []
    for name, values in times.items():
        ratios = [value / floor for value, floor in zip(values, times["floor"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        row = {"pair": pair, "batch": batch, "device": str(alone.components.device), "amp": amp, "compile": compiled}
        row |= {"method": name, "over_floor": round(median, 4), "spread": [round(low, 4), round(high, 4)]}
        row["rounds"] = rounds
        row["ratio_of_minima"] = round(min(values) / min(times["floor"]), 4)
        row["ms"] = round(1e3 * statistics.median(values), 2)
        rows.append(row)
        print(
            f"{pair:10} {batch:5} {name:12} {row['over_floor']:.3f}  [{low:.3f}, {high:.3f}]  {row['ms']} ms",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--batches", default="128")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="the floor's networks and the tool's are compiled")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    methods = arguments.methods.split(",")
    with compiler_settings(arguments.compile):
        for pair in arguments.pairs.split(","):
            for batch in map(int, arguments.batches.split(",")):
                rows += measure(
                    pair, batch, methods, arguments.device, arguments.amp, arguments.rounds, arguments.compile
                )
    save(arguments.json, rows, ("timm",))


if __name__ == "__main__":
    main()
