"""Runs functions in several processes that have joined one another."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from irgdistill.config import load_config
from irgdistill.io import Report, RunFolder
from irgdistill.runtime import World, process_group
from irgdistill.training import Trainer, build_trainer, prepare, seed_process


def _one(rank: int, size: int, port: int, path: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with process_group("cpu", "gloo") as world:
        torch.save(function(world, *args), f"{path}/{rank}.pt")


def in_ranks(size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(world, *args)` gives in each of `size` processes that have joined."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["irgdistill.commands.distill", "sklearn.datasets"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    call = [(rank, size, port, str(folder), function, args) for rank in range(size)]
    processes = [context.Process(target=_one, args=each) for each in call]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def trainer_of(world: World, flags: dict[str, Any], folder: Path) -> Trainer:
    config = load_config(flags=flags)
    run = RunFolder(folder)
    if world.main:
        run.create(overwrite=True)
    trainer = build_trainer(prepare(config), run, Report(run.metrics, quiet=not world.main), world)
    seed_process(config.seed, world)
    trainer.components.trained.train()
    return trainer
