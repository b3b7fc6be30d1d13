"""A planned run tried on this machine: the memory of its step, measured on few images; the speed of step and loader.

Images of noise go through the trainer's own step, twice as many each time until it takes long enough to be timed; the
memory of the two largest gives that of any batch. Nothing is written. `torch.compile` is left out.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from irgdistill.io import Report, RunFolder
from irgdistill.training import Setup, Trainer

FEW = 2
"""Images of the first step."""


STEP_SECONDS, LOADER_SECONDS = 1.0, 5.0
"""A step this long is long enough; the loader is watched for so long at most."""


@dataclass(frozen=True)
class Trial:
    """What one process of a run needs, in bytes, and how fast it goes."""

    weights: int
    """Of all networks."""
    optimizer: int
    fixed: int
    """Gradients, and whatever else a step holds for any number of images."""
    per_image: float
    saved: int
    """On disk at once, at most: two students and three states."""
    step_images: int
    """Images of the largest step that was tried."""
    step_rate: float
    """Images per second."""
    loader_rate: float
    bad_images: list[str]

    def memory(self, batch: int) -> int:
        """Bytes at a batch size. What grows faster than the batch (B² edges, B³ angles of `rkd`) counts as if not."""
        return int(self.weights + self.optimizer + self.fixed + self.per_image * batch)

    def largest(self, available: int) -> int:
        """The largest batch that fits; 0: none."""
        room = available - self.memory(0)
        return max(int(room / max(self.per_image, 1.0)), 0)


def try_run(setup: Setup, batch: int, available: int) -> Trial:
    """Try a run whose processes take `batch` images each. Raises UserError as the run would, OutOfMemoryError."""
    # At a learning rate near 0 the noise teaches nothing.
    setup = replace(setup, config=setup.config.replaced({"runtime.compile": False, "optim.lr": 1e-12}))
    trainer = Trainer(setup, RunFolder(Path("none")), Report(quiet=True))
    trainer.student.train()
    tried = _try_steps(trainer, batch, available // 2)
    (few, less, _), (images, peak, seconds) = tried[-2:] if len(tried) > 1 else [(0, 0, 0.0), *tried]
    per_image = (peak - less) / (images - few)
    networks = [
        trainer.student,
        trainer.teacher,
        trainer.ema,
        *([] if setup.booster is None else [setup.booster.model]),
    ]
    student, optimizer = _size(_tensors([trainer.tapped])), _size(tree_leaves(trainer.optimizer.state_dict()["state"]))
    return Trial(
        weights=_size(_tensors(networks)),
        optimizer=optimizer,
        fixed=int(peak - images * per_image),
        per_image=per_image,
        saved=2 * student + 3 * (_size(_tensors([trainer.student, trainer.ema])) + optimizer),
        step_images=images,
        step_rate=images / seconds,
        loader_rate=_time_loader(trainer),
        bad_images=trainer.bad.names,
    )


def _try_steps(trainer: Trainer, batch: int, most: int) -> list[tuple[int, int, float]]:
    """Images, bytes and seconds of ever larger steps, up to the batch, to `STEP_SECONDS`, or to `most` bytes."""
    tried: list[tuple[int, int, float]] = []
    count = min(FEW, batch)
    _step(trainer, count)  # optimizers make their state in the first update
    while True:
        peak, begin = _peak(trainer, count), _now(trainer.device)
        _step(trainer, count)
        tried.append((count, peak, _now(trainer.device) - begin))
        enough = len(tried) > 1 and (tried[-1][2] > STEP_SECONDS or 2 * peak > most)
        if count == batch or enough:
            return tried
        count = min(2 * count, batch)


def _step(trainer: Trainer, count: int) -> None:
    """One update on `count` images of noise, like the run's first one."""
    device, size = trainer.device, (count, 3, *trainer.setup.crop.size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    labels = torch.randint(0, len(trainer.setup.classes), (count,), device=device)
    trainer.batch = trainer.update = 0
    while trainer.update == 0:
        trainer.train_step(images, labels)


def _peak(trainer: Trainer, count: int) -> int:
    """Bytes that a step takes beyond what was there before it."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
        torch.cuda.reset_peak_memory_stats(trainer.device)
        before = int(torch.cuda.memory_allocated(trainer.device))
        _step(trainer, count)
        return int(torch.cuda.max_memory_allocated(trainer.device)) - before
    live = LiveBytes()
    with live:
        _step(trainer, count)
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Within, counts the bytes of the tensors that operators make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._take(tensor.untyped_storage())
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _time_loader(trainer: Trainer) -> float:
    """Images per second, after as many batches as there are workers: those were made while they started."""
    images, begin = 0, time.perf_counter()
    workers = trainer.config.data.workers
    warm = workers if len(trainer.train) > 2 * workers else 0
    for number, (_, labels) in enumerate(trainer.train.epoch()):
        if number < warm:
            begin = time.perf_counter()
            continue
        images += len(labels)
        if time.perf_counter() - begin > LOADER_SECONDS:
            break
    return images / (time.perf_counter() - begin)


def _tensors(modules: Iterable[nn.Module | None]) -> list[Tensor]:
    return [t for module in modules if module is not None for t in (*module.parameters(), *module.buffers())]


def _size(values: Iterable[Any]) -> int:
    """Bytes of all tensors among the values, each storage counted once."""
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values if isinstance(v, Tensor)}
    return sum(storages.values())
