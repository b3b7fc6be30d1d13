"""Loader processes: forked before CUDA has started, never after it; the batches are the same, bit for bit."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import OLD, SMALL, Run, input_spec
from support.processes import forks

from irgdistill.config.schema import AugmentConfig, DataConfig
from irgdistill.data.dataset import UnreadableImages
from irgdistill.data.loader import Loader, train_loader
from irgdistill.data.open import open_splits
from irgdistill.data.splits import Splits
from irgdistill.errors import UserError
from irgdistill.plugins import import_plugin, snapshot
from irgdistill.runtime.loader_processes import LoaderContext, LoaderProcess, loader_context
from irgdistill.runtime.signals import ignore_signals
from irgdistill.training.teacher_cache import TeacherCache
from irgdistill.training.teachers import CachedRows

Cuda = Callable[[bool], None]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A machine with a GPU; the function sets whether CUDA has started."""
    forks()
    ensure_running()  # the server of the other tests

    def started(value: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: value)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    started(False)
    return started


def train(splits: Splits, config: DataConfig, *more: Any) -> Loader:
    bad = UnreadableImages(3)
    return train_loader(splits, config, AugmentConfig(), input_spec(16), torch.device("cpu"), 0, bad, None, *more)


def same(a: list[tuple[Any, ...]], b: list[tuple[Any, ...]]) -> bool:
    return all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))


def test_the_start_follows_cuda(cuda: Cuda) -> None:
    assert loader_context().get_start_method() == "fork"
    cuda(True)
    assert isinstance(loader_context(), LoaderContext) and loader_context().get_start_method() != "fork"


@pytest.mark.parametrize("gib", [0, 1], ids=["read", "held"])
def test_batches_are_those_of_forked_processes(cuda: Cuda, folder: Path, gib: int) -> None:
    """With a second view, rows of a teacher cache and an unreadable image. CUDA starts after the loader was built."""
    (folder / "train" / "red" / "003.png").write_bytes(b"not an image")
    cache = TeacherCache(OLD / "cache")
    cache.open()
    config = DataConfig(source=str(folder), batch_size=24, workers=2, image_cache_gib=gib, views=1)
    config = config.replaced({"second_view": "rand-m9-n2-inc1"})
    loaders = [train(open_splits(config), config, CachedRows([cache])) for _ in range(2)]
    forked = [batch for epoch in range(2) for batch in loaders[0].epoch(epoch)]
    cuda(True)
    new = [batch for epoch in range(2) for batch in loaders[1].epoch(epoch)]
    assert len(forked) == 12 and len(forked[0]) == 3 and same(forked, new)
    kinds = [type(child) for child in multiprocessing.active_children() if "LoaderProcess" in type(child).__name__]
    assert kinds == [LoaderProcess] * 2, "they live on from epoch to epoch"
    for loader in loaders:
        loader.unreadable.collect()
        assert [Path(name).name for name in loader.unreadable.names] == ["003.png"]
        held = loader.loader.dataset.cache
        assert (held is not None) == bool(gib)
        if held is not None:  # what the other processes have read is here too
            assert held.states.bool().sum() == 72
    held = loaders[1].loader.dataset.cache
    if held is not None:
        loaders[1].loader.dataset.source.load = None
        assert torch.equal(held.pixels, loaders[0].loader.dataset.cache.pixels)


def test_a_stream_begins_each_epoch_anew(cuda: Cuda, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-000.tar", "w") as tar:
            for number in range(8):
                content = io.BytesIO()
                Image.new("RGB", (16, 16), (30 * number, 0, 0)).save(content, "png")
                for ending, value in (("png", content.getvalue()), ("cls", str(number % 2).encode())):
                    entry = tarfile.TarInfo(f"{number}.{ending}")
                    entry.size = len(value)
                    tar.addfile(entry, io.BytesIO(value))
    config = DataConfig(source=f"wds/{tmp_path}", batch_size=4, workers=1)
    epochs = []
    for started in (False, True):
        cuda(started)
        epochs.append([list(train(open_splits(config), config).epoch(number)) for number in range(2)])
    assert all(same(a, b) for a, b in zip(*epochs, strict=True)) and not same(*epochs[1])


PLUGIN = """
import signal
from PIL import Image
from irgdistill.data import Splits, source


class Shades:
    def __setstate__(self, state):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.label = int({signal.SIGINT, signal.SIGTERM} <= blocked)

    def __getstate__(self):
        return {"a": "state"}

    def __len__(self):
        return 8

    def load(self, index):
        return Image.new("RGB", (16, 16), (index, 0, 0)), self.label

    def describe(self, index):
        return f"shade {index}"

    def labels(self):
        return [0, 1] * 4


@source("blocked-shades")
def open_shades(config, val_only=False):
    shades = Shades()
    return Splits(shades, shades, ["0", "1"], range(8), range(8))
"""


@pytest.fixture
def shades(tmp_path: Path) -> Iterator[Splits]:
    restore = snapshot()
    (tmp_path / "shades.py").write_text(PLUGIN)
    import_plugin(tmp_path / "shades.py")
    yield open_splits(DataConfig(source="blocked-shades"))
    restore()


def test_plugins_are_imported_and_signals_wait(cuda: Cuda, shades: Splits) -> None:
    """A source of a plug-in, whose label is whether signals were blocked when it arrived in the process."""
    cuda(True)
    (_, labels), *_ = train(shades, DataConfig(batch_size=8, workers=1, image_cache_gib=0)).epoch()
    assert labels.tolist() == [1] * 8


def test_images_of_a_class_of_the_script_are_refused(
    cuda: Cuda, shades: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda(True)
    own = type("Own", (), {"__module__": "__main__", "__len__": lambda self: 8})
    monkeypatch.setattr(sys.modules["__main__"], "Own", own, raising=False)
    shades.train = own()
    with pytest.raises(UserError, match=r"class '__main__.Own'.*; define what reads them in a module or a --plugin"):
        next(train(shades, DataConfig(batch_size=8, workers=1, image_cache_gib=0)).epoch())


def wait(path: str) -> None:
    ignore_signals(0)
    Path(path).touch()
    time.sleep(60)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who sent a signal")
def test_only_the_process_that_started_a_loader_process_ends_it(cuda: Cuda, tmp_path: Path) -> None:
    process = LoaderContext().Process(target=wait, args=(str(tmp_path / "ready"),))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    other = multiprocessing.get_context("fork").Process(target=kill, args=(process.pid,))
    other.start()
    other.join()
    process.join(0.3)
    assert process.is_alive()
    process.terminate()
    process.join(10)
    assert process.exitcode == 0


def test_a_loader_process_ends_with_the_one_that_started_it(cuda: Cuda, tmp_path: Path) -> None:
    """The server lives as long as a process that it forked, so that neither would end by itself."""
    process = LoaderContext().Process(target=wait, args=(str(tmp_path / "ready"),))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process._popen.finalizer()  # closes the pipe, as the system does when this process is killed
    for _ in range(500):
        try:
            os.kill(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("it lives on")


def test_no_command_forks_a_loader_process(
    cuda: Cuda, run: Run, folder: Path, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise AssertionError("forked after CUDA has started")

    monkeypatch.setattr(os, "fork", fork)
    cuda(True)
    given = ("--data", folder, *SMALL, "--workers", 1, "--device", "cpu")
    taught = ("--teacher", "cifar_resnet14_x0_5", "--teacher-checkpoint", teacher)
    cached = run("cache-teacher", *given, *taught, "--output", tmp_path / "cache")
    assert cached.code == 0, cached.err
    student = ("--student", "cifar_resnet14_x0_5", "--epochs", 1, "--output", tmp_path / "run")
    trained = run("distill", *given, *student, "--teacher-cache", tmp_path / "cache", "--method", "kd")
    assert trained.code == 0, trained.err
    evaluated = run("eval", tmp_path / "run", "--workers", 1, "--device", "cpu")
    assert evaluated.code == 0, evaluated.err
