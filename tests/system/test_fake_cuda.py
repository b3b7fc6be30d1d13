"""What a GPU would see, where there is none: every tensor of a step is on it, and the host reads once.

What a stand-in cannot tell (values, speed, streams, NCCL) is in test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251
from support.fake_cuda import GPU, fake_cuda
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from irgdistill.config.loading import load_config
from irgdistill.config.methods import METHODS
from irgdistill.io.console import Report
from irgdistill.io.run_folder import RunFolder
from irgdistill.matching.taps import Output
from irgdistill.runtime.distributed import World
from irgdistill.training import evaluation
from irgdistill.training import trainer as trainer_module
from irgdistill.training.setup import Setup, prepare
from irgdistill.training.teacher_cache import TeacherCache
from irgdistill.training.trainer import Trainer, build_trainer

BATCH, SIZE = 8, 32
NCCL = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8}
"""Types of tensors that NCCL takes; booleans go as bytes."""


def setup_of(method: str, **more: Any) -> Setup:
    flags = {
        "method": method, "student.name": "cifar_resnet14_x0_5", "student.input_size": SIZE, "data.source": "digits",
        "data.val_fraction": 0.5, "data.batch_size": BATCH, "data.workers": 0, "data.image_cache_gib": 0,
        "runtime.fold_batch_norm": False, "runtime.gradient_shares_every": 0, "teacher.name": "cifar_resnet20",
    }  # fmt: skip
    config = load_config(flags={**flags, **{key.replace("__", "."): value for key, value in more.items()}})
    if config.losses.comparing("views"):
        config = config.replaced({"data.second_view": "rand-m3-n1-inc1"})
    return prepare(config, fetch=False)


@dataclass
class Step:
    """What a step on the fake GPU gave."""

    values: dict[str, Tensor]
    student: Output
    trainer: Trainer


class Copies(TorchDispatchMode):
    """Counts what moves to the host, each of which waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_gpu = any(isinstance(value, Tensor) and value.device == GPU for value in args)
        result = func(*args, **(kwargs or {}))
        if on_gpu and isinstance(result, Tensor) and result.device.type == "cpu":
            self.found.append(str(func))
        return result


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Step]]:
    """Run a step of a setup on the fake GPU. `.item()`, `.tolist()` and `bool()` of its tensors raise by themselves."""

    def run(setup: Setup, world: World | None = None) -> Step:
        with fake_cuda(monkeypatch), monkeypatch.context() as patch:
            patch.setattr(Tensor, "backward", lambda *_, **__: None)
            reads: list[Tensor] = []

            def read_later(flag: Tensor) -> Callable[[], bool]:
                reads.append(flag)
                return lambda: False

            patch.setattr(trainer_module, "read_later", read_later)
            patch.setattr(torch.amp.GradScaler, "step", lambda *_: None)  # there are no gradients
            patch.setattr(torch.amp.GradScaler, "update", lambda *_: None)
            trainer = build_trainer(setup, RunFolder(tmp_path / "run"), Report(quiet=True), world)
            trainer.components.trained.train()
            images = torch.zeros(BATCH, 3, SIZE, SIZE, dtype=torch.uint8, device=GPU)
            labels = torch.zeros(BATCH, dtype=torch.int64, device=GPU)
            with Copies() as copies:
                values = trainer.train_step(images, labels)
                trainer.progress.add(values)
            check(trainer.progress.sums)
            held = [x for term in trainer.components.loss.terms.values() for x in vars(term).values()]
            assert {x.device for x in held if isinstance(x, Tensor)} <= {GPU}
            assert copies.found == [] and [flag.device for flag in reads] == [GPU]  # the one read of the host
            with trainer.components.autocast:
                return Step(values, trainer.components.student(images), trainer)

    return run


def check(values: dict[str, Tensor]) -> None:
    assert {value.device for value in values.values()} == {GPU}
    assert {value.dtype for value in values.values()} == {torch.float32}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_value_of_a_step_is_on_the_gpu(step: Any, method: str) -> None:
    done = step(setup_of(method))
    check(done.values)
    assert set(done.values) == {"loss", *done.trainer.components.loss.terms}
    assert done.trainer.config.runtime.amp == "bf16"  # auto


PRECISION = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize(
    "options",
    [
        {"runtime__amp": "none"},
        {"runtime__amp": "fp16"},
        {"runtime__channels_last": True},
        {"augment__mixup": 0.2, "augment__cutmix": 1.0},
        {"losses__ce__class_weights": "balanced", "losses__ce__label_smoothing": 0.1},
        {"optim__ema": 0.9, "optim__accumulate": 2},
        {"teacher__input_size": 48},
        {"data__labels": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_so_it_is_with_options(step: Any, options: dict[str, Any]) -> None:
    done = step(setup_of("irg+kd+at", **options))
    check(done.values)
    assert done.student.logits.dtype == PRECISION[options.get("runtime__amp", "bf16")]
    assert {x.dtype for x in done.student.features.values()} == {torch.float32}


def test_answers_of_a_cache_and_sums_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TeacherCache(Path(__file__).parents[1] / "data/old/cache")
    cache.open()
    rows = cache.teacher_rows([3, 5])
    with fake_cuda(monkeypatch):
        output = cache.output(torch.zeros(rows.shape, dtype=torch.uint8, device=GPU))
        found = [output.logits, *output.features.values(), *output.energies.values()]
        assert {(x.device, x.dtype) for x in found} == {(GPU, torch.float32)}
        logits, labels = torch.zeros(4, 10, device=GPU), torch.zeros(4, dtype=torch.int64, device=GPU)
        assert evaluation._batch_sums(logits, labels, logits).device == GPU
        assert evaluation._batch_bins(logits, labels).device == GPU


# --- many GPUs --------------------------------------------------------------------------------------------------------


@contextmanager
def eight_processes(patch: pytest.MonkeyPatch) -> Iterator[tuple[World, list[tuple[str, Tensor]]]]:
    """The first of eight processes, whose collectives do nothing, and what it hands to them."""
    handed: list[tuple[str, Tensor]] = []

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            handed.extend((name, value) for value in [*tensors, *args[1:2]] if isinstance(value, Tensor))
            return original(*args, **options)

        return call

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        for name in ("all_reduce", "all_gather"):
            patch.setattr(dist, name, watched(name))
        patch.setattr(World, "broadcast", lambda _, value: value)
        patch.setattr(World, "wrap", lambda _, network, unused: network)  # DDP would look at the memory of tensors
        yield World(0, 8, 0), handed
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("method", ["irg+kd+at", "mtk", "rkd", "sp", "pkt", "positions"])
def test_nccl_gets_tensors_on_the_gpu_of_types_that_it_takes(
    step: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    setup = setup_of(method if method in METHODS else "irg+kd+at")
    with monkeypatch.context() as patch, eight_processes(patch) as (world, handed):
        patch.setattr(Trainer, "train_step", _after(handed, Trainer.train_step))
        check(step(setup, world).values)
    names = {name for name, _ in handed}
    assert "all_reduce" in names
    assert {value.device for _, value in handed} == {GPU}
    assert {value.dtype for _, value in handed} <= NCCL
    gathered = [value for name, value in handed if name == "all_gather"]
    assert ("irg" in method) <= bool(gathered) and all(len(value) == BATCH for value in gathered)


def _after(handed: list[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with what was handed over before forgotten: while a run is built, gloo counts images on the CPU."""

    def call(*args: Any, **options: Any) -> Any:
        assert all(value.device.type == "cpu" for _, value in handed)
        handed.clear()
        return function(*args, **options)

    return call
