"""Many processes: starting them, who is who, reductions, and a gather that carries the gradient.

The only file that touches `torch.distributed`. Every loss is a mean over the images of one process, all processes hold
equally many, and DDP takes the mean of their gradients: so a term that gathers features and gives the mean over its own
rows is, over all processes, the mean over the whole relation graph, and its gradient is that of one process with all
images. A `World` of one process does nothing and costs nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from irgdistill.runtime.environment import ranks, restarts

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place on this machine: the number of the GPU"""

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """Where this process's `count` images stand among those of all."""
        return slice(self.rank * count, (self.rank + 1) * count)

    def gather(self, values: Tensor) -> Tensor:
        """(b, …) of every process -> (size·b, …) on each, in the order of ranks, with gradient to each one's own."""
        return values if self.size == 1 else cast(Tensor, _Gather.apply(values, self))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, without gradient."""
        return self.sum(values) / self.size

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, without gradient."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        """Largest over the processes, elementwise, without gradient."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def share(self, value: T) -> T:
        """The first process's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def collect(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        if self.size == 1 or values.is_meta:
            return values
        values = values.detach().contiguous().clone()
        dist.all_reduce(values, how)
        return values

    # --- networks -----------------------------------------------------------------------------------------------------

    def wrap(self, network: nn.Module, unused: bool) -> nn.Module:
        """DDP where there are several processes; `unused`: some parameters get no gradient."""
        if self.size == 1:
            return network
        device = next(network.parameters()).device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what replaces broadcast_buffers is newer than torch 2.6
            return DistributedDataParallel(
                network,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=unused,
            )

    def local_gradients(self, network: nn.Module, wanted: bool) -> AbstractContextManager[None]:
        """While `wanted`, backward adds up gradients on each process without exchanging them."""
        if wanted and isinstance(network, DistributedDataParallel):
            return cast(AbstractContextManager[None], network.no_sync())
        return nullcontext()

    def average_statistics(self, model: nn.Module) -> None:
        """Give every process the mean of all running means and variances."""
        for name, buffer in statistics_of(model).items():
            assert buffer.is_floating_point(), name
            buffer.copy_(self.mean(buffer))


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances, by name: what processes see differently without synchronised batch-norm."""
    return {name: b for name, b in model.named_buffers() if name.rpartition(".")[2] in ("running_mean", "running_var")}


@contextmanager
def joined(device: str, backend: str | None) -> Iterator[World]:
    """The world that the environment describes, until the end of the block.

    CPU tensors travel by gloo, CUDA tensors by `backend` (nccl where there are GPUs). Raises RuntimeError where the
    other processes do not answer.
    """
    if ranks() == 1:
        yield World()
        return
    world = World(int(os.environ["RANK"]), ranks(), int(os.environ.get("LOCAL_RANK", 0)))
    if device != "cpu" and torch.cuda.is_available() and backend != "gloo":
        torch.cuda.set_device(world.local_rank)
        backend = f"cpu:gloo,cuda:{backend or 'nccl'}"
    # After a restart torchrun's store still holds the addresses of the processes that ended: a new part for each start.
    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"start-{restarts()}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend or "gloo", store=store, rank=rank, world_size=size)
    try:
        yield world
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """Features of all processes; backward hands each process what all of them ask of its features."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, world: World) -> Tensor:
        ctx.world, ctx.count = world, len(values)
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(world.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.world.sum(gradients[0])[ctx.world.rows(ctx.count)], None
