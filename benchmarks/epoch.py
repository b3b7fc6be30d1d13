"""Images per second of whole epochs: a bare PyTorch loop, torchdistill from the registry, and this tool.

    pip install torchdistill
    python benchmarks/epoch.py --data ./cifar10 --teacher cifar_resnet20 --teacher-checkpoint FILE \
        --student cifar_resnet20_x0_5 --images 10000 --json benchmarks/results/epoch.json

    bare          the student alone: torchvision's ImageFolder and transforms, DataLoader, SGD; what one writes by hand
    bare-rkd      the same with the teacher under no_grad and RKD on the pooled features
    torchdistill  its DistillationBox doing RKD on the same pair, over the same loader
    rkd, irg+kd   this tool's epoch, its own loader and logging included

Same images, batch, worker processes, precision and memory format; an epoch of each in turn, in an order that changes.
The first round, in which processes start and images are decoded into memory, is not counted. `over_bare` is the median
of the rounds' ratios of seconds to those of `bare-rkd`, the bare loop doing the same work as torchdistill.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import epoch_rows, save
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from irgdistill.config.loading import load_config
from irgdistill.io.console import Report
from irgdistill.io.run_folder import RunFolder
from irgdistill.losses.terms.similarity import rkd_loss
from irgdistill.models.build import build_network
from irgdistill.models.checkpoint import restore
from irgdistill.training.setup import prepare
from irgdistill.training.trainer import build_trainer

POOLED = "fc.0"
Epoch = Callable[[], None]


def loader_of(arguments: argparse.Namespace, mean: Any, std: Any) -> Any:
    """ImageFolder as by hand: crop, mirror, normalise."""
    steps = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = datasets.ImageFolder(
        str(Path(arguments.data) / "train"), transforms.Compose([*steps, transforms.Normalize(mean, std)])
    )
    chosen = Subset(images, range(0, len(images), len(images) // arguments.images)[: arguments.images])
    workers = arguments.workers
    return DataLoader(
        chosen, arguments.batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )


def networks(arguments: argparse.Namespace) -> tuple[Any, Any]:
    teacher = restore(Path(arguments.teacher_checkpoint), arguments.teacher)[0]
    student = build_network(arguments.student, num_classes=teacher.num_classes)
    for network in (teacher, student):
        network.model.to(memory_format=torch.channels_last)
        network.model.fc = nn.Sequential(nn.Identity(), network.model.fc)  # gives the pooled features a name
    return teacher, student


def bare(arguments: argparse.Namespace, precision: Any, hint: bool) -> Epoch:
    teacher, student = networks(arguments)
    loader = loader_of(arguments, teacher.mean, teacher.std)
    taken: dict[str, Any] = {}
    for role, network in (("teacher", teacher), ("student", student)):
        module = network.model.get_submodule(POOLED)
        module.register_forward_hook(lambda _module, _args, out, role=role: taken.update({role: out.flatten(1)}))  # type: ignore[misc]
    teacher.model.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.model.parameters(), 0.01, momentum=0.9)

    def epoch() -> None:
        student.model.train()
        for images, labels in loader:
            x = images.contiguous(memory_format=torch.channels_last)
            with precision:
                if hint:
                    with torch.no_grad():
                        teacher.model(x)
                logits = student.model(x)
            loss = F.cross_entropy(logits.float(), labels)
            if hint:
                loss = loss + 25 * rkd_loss(taken["student"], taken["teacher"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def torchdistill(arguments: argparse.Namespace, precision: Any) -> Epoch:
    from torchdistill.common.constant import def_logger
    from torchdistill.core.distillation import DistillationBox

    def_logger.setLevel(logging.WARNING)
    teacher, student = networks(arguments)
    loader = loader_of(arguments, teacher.mean, teacher.std)
    rkd = {"student_output_path": POOLED, "teacher_output_path": POOLED, "dist_factor": 1.0, "angle_factor": 2.0}
    terms = {
        "ce": {
            "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
            "criterion_wrapper": {
                "key": "SimpleLossWrapper",
                "kwargs": {
                    "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
                    "target": {"uses_label": True},
                },
            },
            "weight": 1.0,
        },
        "rkd": {"criterion": {"key": "RKDLoss", "kwargs": {**rkd, "reduction": "mean"}}, "weight": 25.0},
    }
    batch_only = {"forward_proc": "forward_batch_only"}
    hook = {"forward_hook": {"input": [], "output": [POOLED]}}
    config = {
        "num_epochs": 1000,
        "teacher": {**hook, "requires_grad": False, "sequential": [], "wrapper": None, **batch_only},
        "student": {**hook, "sequential": [], "wrapper": None, **batch_only},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = DistillationBox(teacher.model, student.model, {}, config, torch.device("cpu"), None, False, 1)
    box.train_data_loader = loader

    def epoch() -> None:
        box.student_model.train()
        box.teacher_model.eval()
        for images, labels in loader:
            box.pre_forward_process()
            with precision:
                loss = box.forward_process(images.contiguous(memory_format=torch.channels_last), labels, None)
            box.post_forward_process(loss=loss)

    return epoch


def ours(arguments: argparse.Namespace, method: str, folder: Path) -> Epoch:
    flags = {
        "method": method, "teacher.name": arguments.teacher, "teacher.checkpoint": arguments.teacher_checkpoint,
        "student.name": arguments.student, "data.source": arguments.data, "data.train_images": arguments.images,
        "data.batch_size": arguments.batch_size, "data.workers": arguments.workers, "runtime.amp": arguments.amp,
        "runtime.channels_last": True, "schedule.epochs": 1000, "optim.lr": 0.01,
    }  # fmt: skip
    trainer = build_trainer(prepare(load_config(flags=flags)), RunFolder(folder / method), Report(quiet=True))

    def epoch() -> None:
        trainer.progress.batch, trainer.progress.sums = 0, {}
        trainer.train_epoch()
        trainer.progress.epoch += 1

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("data", "teacher", "teacher-checkpoint", "student"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--amp", default="bf16", choices=["bf16", "none"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    precision = torch.autocast("cpu", torch.bfloat16, enabled=arguments.amp == "bf16")
    with tempfile.TemporaryDirectory() as folder:
        epochs = {
            "bare": bare(arguments, precision, hint=False),
            "bare-rkd": bare(arguments, precision, hint=True),
            "torchdistill": torchdistill(arguments, precision),
            "rkd": ours(arguments, "rkd", Path(folder)),
            "irg+kd": ours(arguments, "irg+kd", Path(folder)),
        }
        times: dict[str, list[float]] = {kind: [] for kind in epochs}
        order = list(epochs)
        for number in range(arguments.rounds + 1):
            random.Random(number).shuffle(order)
            for kind in order:
                started = time.perf_counter()
                epochs[kind]()
                if number:
                    times[kind].append(time.perf_counter() - started)
    about = {key: str(vars(arguments)[key]) for key in ("teacher", "student", "images", "batch_size", "workers", "amp")}
    rows = epoch_rows(times, "bare-rkd", "over_bare", arguments.images)
    save(arguments.json, rows, ("timm", "torchdistill"), **about)


if __name__ == "__main__":
    main()
