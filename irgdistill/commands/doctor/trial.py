"""Tries a planned run on this machine: the memory of a step, the speed of step and loader.

Batches of noise go through the trainer's own step, doubled until a step takes long enough to be timed. Memory is linear
in the batch size, so the two largest batches give that of any other. Nothing is written, nothing compiled.
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
from irgdistill.runtime import keep_memory
from irgdistill.training import CachedRows, Setup, Trainer, build_trainer, now

FEW = 2
"""Images of the first step."""


STEP_SECONDS, LOADER_SECONDS = 1.0, 5.0
"""Steps are doubled up to the first duration; the loader is timed for the second at most."""


@dataclass(frozen=True)
class Trial:
    """Memory of one process of a run in bytes, its precision, and its speed."""

    precision: str
    """`none`, `bf16` or `fp16`: what `--amp auto` is for these networks here."""
    weights: int
    """All networks."""
    optimizer: int
    fixed: int
    """Gradients, and other memory of a step that does not depend on the number of images."""
    per_image: float
    saved: int
    """Most bytes on disk at once: two students and three states."""
    step_images: int
    """Images of the largest step."""
    step_rate: float
    """Images per second."""
    loader_rate: float
    bad_images: list[str]

    def memory(self, batch: int) -> int:
        """Bytes at a batch size. Terms that grow faster than the batch (B² edges, B³ angles) count as linear."""
        return int(self.weights + self.optimizer + self.fixed + self.per_image * batch)

    def largest(self, available: int) -> int:
        """The largest batch that fits, 0 if none does."""
        room = available - self.memory(0)
        return max(int(room / max(self.per_image, 1.0)), 0)


def try_run(setup: Setup, batch: int, available: int) -> Trial:
    """Try a run with `batch` images per process. Raises UserError as the run would, and OutOfMemoryError."""
    # At a learning rate near 0 the noise teaches nothing.
    setup = replace(setup, config=setup.config.replaced({"runtime.compile": False, "optim.lr": 1e-12}))
    trainer = build_trainer(setup, RunFolder(Path("none")), Report(quiet=True))
    components = trainer.components
    keep_memory(components.device)
    components.trained.train()
    tried = _try_steps(trainer, batch, available // 2)
    (few, less, _), (images, peak, seconds) = tried[-2:] if len(tried) > 1 else [(0, 0, 0.0), *tried]
    per_image = (peak - less) / (images - few)
    teachers = [] if components.teacher is None else components.teacher.networks
    booster = None if setup.booster is None else setup.booster.model
    student = _size(_tensors([components.student]))
    optimizer = _size(tree_leaves(components.optimizer.state_dict()["state"]))
    return Trial(
        precision=components.config.runtime.amp,
        weights=_size(_tensors([components.trained, *teachers, components.ema, booster])),
        optimizer=optimizer,
        fixed=int(peak - images * per_image),
        per_image=per_image,
        saved=2 * student + 3 * (_size(_tensors([components.trained, components.ema])) + optimizer),
        step_images=images,
        step_rate=images / seconds,
        loader_rate=_time_loader(trainer),
        bad_images=components.unreadable.names,
    )


def _try_steps(trainer: Trainer, batch: int, most: int) -> list[tuple[int, int, float]]:
    """Images, bytes and seconds of ever larger steps, up to the batch, `STEP_SECONDS`, or `most` bytes."""
    tried: list[tuple[int, int, float]] = []
    count = min(FEW, batch)
    _step(trainer, count)  # the first update creates the optimizer's state
    while True:
        peak, begin = _peak(trainer, count), now(trainer.components.device)
        _step(trainer, count)
        tried.append((count, peak, now(trainer.components.device) - begin))
        enough = len(tried) > 1 and (tried[-1][2] > STEP_SECONDS or 2 * peak > most)
        if count == batch or enough:
            return tried
        count = min(2 * count, batch)


def _step(trainer: Trainer, count: int) -> None:
    """One update on `count` images of noise, like the run's first one."""
    run, progress = trainer.components, trainer.progress
    images = torch.randint(0, 256, (count, 3, *run.setup.crop.size), dtype=torch.uint8, device=run.device)
    labels = torch.randint(0, max(len(run.setup.classes), 1), (count,), device=run.device)
    caches = run.setup.caches
    cached = CachedRows(caches)([0] * count).to(run.device) if caches else None
    progress.batch = progress.update = 0
    while progress.update == 0:
        trainer.train_step(images, labels, cached)


def _peak(trainer: Trainer, count: int) -> int:
    """Bytes that a step takes beyond those in use before it."""
    device = trainer.components.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = int(torch.cuda.memory_allocated(device))
        _step(trainer, count)
        return int(torch.cuda.max_memory_allocated(device)) - before
    live = LiveBytes()
    with live:
        _step(trainer, count)
    return live.peak


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of the tensors that operators create, as long as they live.

    PyTorch does not count CPU memory itself. This relies on two private interfaces of torch: `TorchDispatchMode`, and
    `_cdata` as the identity of a storage.
    """

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


def _time_loader(trainer: Trainer) -> float:
    """Images per second, without the first batch of each worker, which is loaded while the workers start."""
    images, begin, loader = 0, time.perf_counter(), trainer.components.train
    workers = trainer.config.data.workers
    warm = workers if len(loader) > 2 * workers else 0
    for number, (_, labels, *_) in enumerate(loader.epoch()):
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
