"""Many processes: starting them, who is who, reductions, and a gather that carries the gradient.

The only file that touches `torch.distributed`. Every loss is a mean over the images of one process, all processes hold
equally many, and DDP takes the mean of their gradients: so a term that gathers features and gives the mean over its own
rows is, over all processes, the mean over the whole relation graph, and its gradient is that of one process with all
images. A `World` of one process does nothing and costs nothing.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from irgdistill.errors import Interrupted
from irgdistill.launched import FAILURES, ranks, restarts

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


# --- starting workers -------------------------------------------------------------------------------------------------


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_workers(count: int, arguments: Sequence[str]) -> None:
    """Run `irgdistill ARGUMENTS` in `count` processes on this machine, through torch's launcher.

    Each joins by `joined`. Raises Interrupted with the message and exit code of the first worker to fail or stop.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its report of a failure is a screenful
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    with TemporaryDirectory() as folder:
        os.environ[FAILURES] = folder
        try:
            elastic_launch(config, sys.executable)("-m", "irgdistill", *arguments)
        except ChildFailedError as error:
            raise _first_failure(folder, error.failures) from None
        except SignalException as error:
            raise _first_failure(folder, {}, error.sigval) from None
        finally:
            del os.environ[FAILURES]


def _first_failure(folder: str, failures: Mapping[int, ProcessFailure], number: int = 0) -> Interrupted:
    """What the first worker to fail wrote; those that a killed one drags along are not to blame."""
    written = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).iterdir()]
    ranks_that_spoke = {failure["rank"] for failure in written}
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and rank not in ranks_that_spoke:
            name = signal.Signals(-failure.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return Interrupted(128 - failure.exitcode, f"worker {rank} was killed by {name}{hint}")
    if written:
        first = min(written, key=lambda failure: float(failure["time"]))
        return Interrupted(first["code"], first["message"])
    return Interrupted(128 + number if number else 1, "interrupted" if number else "a worker ended without a word")


# --- synchronised batch-norm ------------------------------------------------------------------------------------------


def synchronised(model: nn.Module, world: World) -> nn.Module:
    """The same network with batch-norm statistics over the images of all processes; state-dict keys do not change."""
    if world.size == 1:
        return model
    if next(model.parameters()).is_cuda:
        return cast(nn.Module, convert_sync_batchnorm(model))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _SyncAct if isinstance(module, BatchNormAct2d) else _Sync
            module.world = world  # type: ignore[assignment]
    return model


class _Sync(nn.modules.batchnorm._BatchNorm):
    """Batch-norm over all processes on the CPU, where torch's own does not run."""

    world: World

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = _mean_over(x.mean(axes), self.world)
        x = x - mean.view(shape)
        variance = _mean_over(x.square().mean(axes), self.world)
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), self.world.size * input.numel() / input.shape[1])
        x = x * (variance + self.eps).rsqrt().view(shape)
        return (x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x).to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def _track(self, mean: Tensor, variance: Tensor, count: float) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)


class _SyncAct(_Sync):
    """timm's batch-norm with activation."""

    act: nn.Module
    drop: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.drop(super().forward(input))))


class _MeanOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.mean(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.world.mean(gradients[0]), None


def _mean_over(values: Tensor, world: World) -> Tensor:
    """Mean over the processes, with gradient."""
    return cast(Tensor, _MeanOver.apply(values, world))
