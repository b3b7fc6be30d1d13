"""Device and memory of a run."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from irgdistill.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of mallopt(3): the free memory above which some is returned to the system (-1: never), and the number of
allocations that get a mapping of their own."""


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` (this process's GPU, else the CPU), or any torch device. Raises UserError if it is not available."""
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {' '.join(str(error).split())[:120]} (auto, cpu, cuda, cuda:1, …)") from None
    return device


@contextmanager
def gpu_settings(device: torch.device, deterministic: bool) -> Iterator[None]:
    """Let cuDNN search the fastest convolutions, or compute `deterministic` ones; restore the caller's settings.

    Matrix products stay in full float32: relations are computed and differentiated in it, and networks have `--amp`.
    An operator without a deterministic form warns. Does nothing on other devices, where runs are deterministic.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    level = torch.get_deterministic_debug_mode()
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not deterministic, deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
        torch.set_deterministic_debug_mode(level)


def keep_memory(device: torch.device) -> None:
    """Stop glibc from returning freed memory to the system, so that CPU tensors reuse it, as the CUDA allocator does.

    The system fills each new page with zeros, which takes a tenth of a training step at 224 pixels or more. This lasts
    to the end of the process, so only commands call it, never the Python interface. Does nothing on other devices and
    C libraries, or if MALLOC_MMAP_MAX_ or MALLOC_TRIM_THRESHOLD_ is set.
    """
    if device.type != "cpu" or {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl lacks it
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def read_later(flag: Tensor) -> Callable[[], bool]:
    """Start an asynchronous copy of `flag`; the returned function waits for that copy only, and not for later work."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copy, copied = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record(torch.cuda.current_stream(flag.device))

    def read() -> bool:
        copied.synchronize()
        return bool(copy)

    return read
