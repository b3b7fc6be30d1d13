"""The processes of a run: rank and size, reductions, and a gather that carries the gradient.

Only `runtime` touches `torch.distributed`. Every loss is a mean over the images of one process, all processes hold
equally many, and DDP averages their gradients. So a term that gathers features and averages over its own rows is, over
all processes, the mean over the whole relation graph, and its gradient equals that of one process with all images. A
`World` of one process does nothing and costs nothing.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from irgdistill.runtime.environment import restart_count, world_size

T = TypeVar("T")

POLL = 0.005
"""Seconds between two looks at whether rank 0 has come."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and the rank of this one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank on this machine: the number of its GPU."""
    store: Any = field(default=None, repr=False, compare=False)
    """Where the processes leave word for one another; None for a single one."""
    _meetings: Iterator[int] = field(default_factory=count, init=False, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """The rows of this process's `count` images among those of all processes."""
        return slice(self.rank * count, (self.rank + 1) * count)

    def gather(self, values: Tensor) -> Tensor:
        """(b, …) per process -> (size·b, …) on each, in the order of ranks; the gradient flows back to each process."""
        return values if self.size == 1 else cast(Tensor, _Gather.apply(values, self))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, without gradient."""
        return self.sum(values) / self.size

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, without gradient."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        """Largest over the processes, elementwise, without gradient."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def wait(self) -> None:
        """Wait for rank 0, which may do work of its own for longer than a collective would wait.

        Call it after such work, in all processes. The launcher ends the others if rank 0 ends.
        """
        if self.size == 1:
            return
        key = f"wait-{next(self._meetings)}"
        if self.main:
            self.store.set(key, "here")
        while not self.store.check([key]):
            time.sleep(POLL)

    def broadcast(self, value: T) -> T:
        """The value of rank 0, however late it comes."""
        self.wait()
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def collect(self, value: T) -> list[T]:
        """The values of all processes, in the order of ranks, however late rank 0 comes."""
        self.wait()
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def _reduce(self, values: Tensor, how: Any) -> Tensor:
        if self.size == 1 or values.is_meta:
            return values
        values = values.detach().contiguous().clone()
        dist.all_reduce(values, how)
        return values

    # --- networks -----------------------------------------------------------------------------------------------------

    def wrap(self, network: nn.Module, unused: bool) -> nn.Module:
        """Wrap in DDP if there are several processes. `unused`: some parameters get no gradient."""
        if self.size == 1:
            return network
        device = next(network.parameters()).device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers; its replacement needs torch > 2.6
            return DistributedDataParallel(
                network,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=unused,
            )

    def gradients(self, network: nn.Module, exchanged: bool) -> AbstractContextManager[None]:
        """The context of a forward pass. Unless `exchanged`, its backward accumulates gradients in each process."""
        if not exchanged and isinstance(network, DistributedDataParallel):
            return cast(AbstractContextManager[None], network.no_sync())
        return nullcontext()

    def average_statistics(self, model: nn.Module) -> None:
        """Set the running means and variances of every process to their mean over processes."""
        for name, buffer in running_statistics(model).items():
            assert buffer.is_floating_point(), name
            buffer.copy_(self.mean(buffer))


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances by name; without synchronised batch-norm they differ between processes."""
    return {name: b for name, b in model.named_buffers() if name.rpartition(".")[2] in ("running_mean", "running_var")}


@contextmanager
def process_group(device: str, backend: str | None) -> Iterator[World]:
    """Join the processes that the environment describes, until the end of the block.

    CPU tensors use gloo, CUDA tensors `backend` (default nccl). Raises RuntimeError if the other processes do not
    answer.
    """
    if world_size() == 1:
        yield World()
        return
    local_rank, gpu = int(os.environ.get("LOCAL_RANK", 0)), None
    if device != "cpu" and torch.cuda.is_available() and backend != "gloo":
        gpu = torch.device("cuda", local_rank)
        torch.cuda.set_device(gpu)  # before anything is shared: no process may guess its device
        backend = f"cpu:gloo,cuda:{backend or 'nccl'}"
    # After an elastic restart the store still has the dead workers' addresses: use a new key prefix.
    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"start-{restart_count()}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend or "gloo", store=store, rank=rank, world_size=size, device_id=gpu)
    try:
        yield World(rank, size, local_rank, dist.PrefixStore("world", store))  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """Gather the rows of all processes; backward sums over the processes the gradient of each one's rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, world: World) -> Tensor:
        ctx.world, ctx.count = world, len(values)
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(world.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.world.sum(gradients[0])[ctx.world.rows(ctx.count)], None
