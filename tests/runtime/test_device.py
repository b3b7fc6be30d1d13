"""Settings of GPUs are those of a run, and its processes leave other GPUs alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251
from support.processes import in_ranks

from irgdistill.runtime import World, distributed, gpu_settings, process_group
from irgdistill.training import state, trainer

GPU, CPU = torch.device("cuda", 2), torch.device("cpu")


def _settings() -> tuple[bool, bool, int]:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, torch.get_deterministic_debug_mode()


@pytest.mark.parametrize(
    ("device", "deterministic", "expected"),
    [(GPU, False, (True, False, 0)), (GPU, True, (False, True, 1)), (CPU, True, (False, False, 0))],
)
def test_algorithms_of_a_gpu(
    device: torch.device, deterministic: bool, expected: tuple[bool, bool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "before")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = _settings()
    with gpu_settings(device, deterministic):
        assert _settings() == expected
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == (device is GPU and deterministic)
        assert not torch.backends.cuda.matmul.allow_tf32  # relations stay in full float32
    assert _settings() == before


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """States of the generators of eight GPUs by number; to look at all of them fails."""
    states = {number: torch.tensor([number], dtype=torch.uint8) for number in range(8)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: states.update({device.index: value}))
    for name in ("get_rng_state_all", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("a context on every GPU"))
    return states


def test_only_the_state_of_the_own_gpu_is_saved(generators: dict[int, torch.Tensor]) -> None:
    saved = state.random_states(GPU)
    assert saved["cuda"] == [generators[2]]
    assert state.random_states(CPU)["cuda"] == []
    state.restore_random_states(state.RandomStates.parse(saved, Path()), torch.device("cuda", 5))
    assert generators[5].item() == 2
    state.restore_random_states(state.RandomStates.parse(saved, Path()), CPU)


def test_states_of_all_gpus_are_still_read(generators: dict[int, torch.Tensor]) -> None:
    saved = state.random_states(CPU)
    saved["cuda"] = [torch.tensor([10 + number], dtype=torch.uint8) for number in range(4)]
    state.restore_random_states(state.RandomStates.parse(saved, Path()), GPU)
    state.restore_random_states(state.RandomStates.parse(saved, Path()), torch.device("cuda", 6))
    assert [generators[number].item() for number in range(8)] == [0, 1, 12, 3, 4, 5, 6, 7]


def test_a_process_takes_its_gpu_before_it_shares_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []

    def joined(backend: str, device_id: Any, **_: Any) -> None:
        order.append((backend, device_id))

    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", order.append)
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([(dist.HashStore(), 3, 4)]))
    monkeypatch.setattr(dist, "init_process_group", joined)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: order.append("left"))
    with process_group("auto", None) as world:
        assert (world.rank, world.size, world.local_rank) == (3, 4, 2)
    assert order == [GPU, ("cpu:gloo,cuda:nccl", GPU), "left"]


def _work_of_the_first(world: World, ways: list[Callable[..., Any]]) -> list[Any]:
    import time

    group = dist.group.WORLD
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    found = []
    for way in ways:
        if world.main:
            time.sleep(2)
        found.append(way(world, world.rank))
    return found


def test_work_of_the_first_process_may_take_longer_than_a_collective_waits(tmp_path: Path) -> None:
    ways = [World.broadcast, World.collect]
    assert in_ranks(2, tmp_path, _work_of_the_first, ways) == [[0, [0, 1]]] * 2


def test_processes_meet_about_twice_a_second_and_where_a_step_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """At updates of 50 ms: every one, every second, … every tenth; always at one that `--save-every-steps` names."""
    now, met = [100.0], []
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])
    saves = SimpleNamespace(due=lambda: False, due_by_steps=lambda: update == 77)
    world = SimpleNamespace(size=2, maximum=lambda values: met.append(update) or values)
    run: Any = trainer.Trainer(SimpleNamespace(config=None, world=world), None, saves, None)  # type: ignore[arg-type]
    for update in range(1, 100):  # noqa: B007  the lambdas read it
        now[0] += 0.05
        if run._meets():
            run._pause()
    assert met == [1, 3, 7, 15, 25, 35, 45, 55, 65, 75, 77, 87, 97]
    world.size, met[:] = 1, []
    assert run._meets()  # alone: after every update
