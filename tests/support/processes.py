"""Runs functions in several processes that have joined one another."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler  # noqa: TID251

from irgdistill.config import load_config
from irgdistill.io import Report, RunFolder
from irgdistill.runtime import World, process_group
from irgdistill.training import Trainer, build_trainer, prepare, seed_process

PRELOADED = ["irgdistill.commands.distill", "sklearn.datasets"]


def forks() -> Any:
    """Starts processes by forking one that has imported everything and trained nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _one(rank: int, size: int, port: int, path: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with process_group("cpu", "gloo") as world:
        torch.save(function(world, *args), f"{path}/{rank}.pt")


def in_ranks(size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of `function(world, *args)` in each of `size` processes of one group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    call = [(rank, size, port, str(folder), function, args) for rank in range(size)]
    processes = [forks().Process(target=_one, args=each) for each in call]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _answer(path: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.save(function(*args), path)


def forked(folder: Path, function: Callable[..., Any], *args: Any) -> Any:
    """The result of `function(*args)` in a process of its own that has trained nothing before."""
    process = forks().Process(target=_answer, args=(str(folder / "answer.pt"), function, args))
    process.start()
    process.join()
    assert process.exitcode == 0
    return torch.load(folder / "answer.pt")


class Command:
    """A command line in a forked process that leads its own group, as a shell starts it.

    `module`: what `python -m MODULE WORDS…` would run. `fork`: the workers that it starts are forked from it too,
    instead of importing everything anew. `terminal`: where it writes to, in place of files in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        *words: object,
        module: str = "irgdistill",
        fork: bool = True,
        terminal: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._files = [folder / "stdout", folder / "stderr"]
        places = [terminal] * 2 if terminal else list(map(str, self._files))
        self._process = forks().Process(target=_launch, args=(module, words, places, fork, environment))
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode  # type: ignore[no-any-return]

    def worker(self, rank: int) -> int | None:
        """The process of a worker, once all of them have been started."""
        children = [path.read_text().split() for path in Path(f"/proc/{self.pid}/task").glob("*/children")]
        found = sorted(int(child) for some in children for child in some)
        return found[rank] if rank < len(found) else None

    def end(self, seconds: float = 300) -> tuple[int, str, str]:
        """Wait for the end -> exit code, stdout, stderr."""
        self._process.join(seconds)
        code = self.poll()
        assert code is not None, f"still at work after {seconds} s"
        return code, *(path.read_text() for path in self._files)


def _launch(
    module: str, words: tuple[object, ...], places: list[str], fork: bool, environment: dict[str, str] | None
) -> None:
    os.setsid()
    for number, path in enumerate(places, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if environment is not None:
        os.environ.clear()
        os.environ |= environment
    if fork:
        subprocess.Popen = subprocess_handler.Popen = ForkedPopen  # type: ignore[misc]
    _run_module(module, words)


def _run_module(module: str, words: Sequence[object]) -> None:
    torch.set_num_threads(1)
    sys.argv = [module, *map(str, words)]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class ForkedPopen(subprocess.Popen[bytes]):
    """`Popen([python, "-m", MODULE, *WORDS], env=…, start_new_session=True)` by a fork alone."""

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:
        if list(args[:1]) != [sys.executable] or "-m" not in args:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        environment, pipes = rest[5], rest[9:15]
        self.pid = os.fork()
        self._child_created = True
        if self.pid:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        else:
            code = 1
            try:
                os.setsid()
                for target, source in enumerate((pipes[0], pipes[3], pipes[5])):
                    if source != -1:
                        os.dup2(source, target)
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                    signal.signal(number, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.environ |= environment
                _, module, *words = args[args.index("-m") :]
                _run_module(module, words)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)


def trainer_of(world: World, flags: dict[str, Any], folder: Path) -> Trainer:
    config = load_config(flags=flags)
    run = RunFolder(folder)
    if world.main:
        run.create(overwrite=True)
    trainer = build_trainer(prepare(config), run, Report(run.metrics, quiet=not world.main), world)
    seed_process(config.seed, world)
    trainer.components.trained.train()
    return trainer
