"""Where a run computes, and in which precision."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from irgdistill.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""mallopt(3): free memory above which some is given back, -1 never; how many allocations are mapped one by one"""


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` (this process's GPU, else the CPU), or any torch device. Raises UserError when it is not there."""
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {' '.join(str(error).split())[:120]} (auto, cpu, cuda, cuda:1, …)") from None
    return device


def keep_memory(device: torch.device) -> None:
    """A process that computes on the CPU keeps freed memory for the next tensor, as PyTorch does on GPUs; glibc only.

    For loops over batches of one size. glibc gives a large tensor back to the system when it is freed, and the next
    one is made of pages that the system has to fill with zeros first: a tenth of a training step at 224 pixels or more.
    Where MALLOC_MMAP_MAX_ or MALLOC_TRIM_THRESHOLD_ is set, that stands.
    """
    if device.type != "cpu" or {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def autocast(amp: str, device: torch.device) -> Any:
    """Reusable autocast context for a precision of `RuntimeConfig.amp`."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "none"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def read_later(flag: Tensor) -> Callable[[], bool]:
    """What asks for `flag`: it waits for what the device was given up to here, and not for what comes after."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copy, there = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record(torch.cuda.current_stream(flag.device))

    def read() -> bool:
        there.synchronize()
        return bool(copy)

    return read
