"""Precision of a run: what `auto` is on a device, and how fast bf16 is on this CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d

CPUINFO = Path("/proc/cpuinfo")

UNITS = {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}
"""Instructions for bf16 products of x86 and ARM processors, as Linux names them."""


WIDE = ("avx2", "avx512f", "avx512_vnni", "avx512_fp16", "asimd", "sve", "sve2", "i8mm", *sorted(UNITS))
"""Instructions that decide how fast a network is on a CPU."""


WITHOUT_UNITS = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ONEDNN_MAX_CPU_ISA that keep oneDNN, which computes torch's convolutions, from the bf16 instructions."""


GAIN = 1.1
"""How many times as fast bf16 must be for `auto`: a tie is float32, which has more digits."""


ENOUGH = 1.0
"""Seconds after which a measurement repeats nothing more."""


def instructions() -> list[str] | None:
    """Those of `WIDE` that this CPU has and oneDNN may use; None if the system does not list them."""
    if not CPUINFO.exists():
        return None
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    flags = next((set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")), None)
    if flags is None:
        return None
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return [name for name in WIDE if name in flags and not (name in UNITS and limit in WITHOUT_UNITS)]


def may_have_bf16() -> bool:
    """Whether this CPU has instructions for bf16, or the system does not say."""
    found = instructions()
    return found is None or bool(UNITS & set(found))


def resolve_precision(amp: str, device: torch.device, step: Callable[[], object] | None = None) -> str:
    """What a precision of `RuntimeConfig.amp` is on a device: none, bf16 or fp16.

    `auto` on GPUs is bf16, or fp16 where they have no units for it; on a CPU without bf16 instructions none, on others
    the faster of both in a short measurement: of `step`, or of a convolution. Depthwise convolutions have slow
    gradients in bf16, so that only a step of the networks tells which precision is faster for a run.
    """
    if amp != "auto":
        return amp
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type != "cpu":
        return "none"
    if not may_have_bf16():
        return "none"
    speed = bf16_speed() if step is None else compare_precisions(step)
    return "bf16" if speed > GAIN else "none"


def slow_precision(amp: str, device: torch.device) -> str | None:
    """A warning if bf16 was asked for on a CPU that has no instructions for it and is slower with it."""
    if amp != "bf16" or device.type != "cpu" or UNITS & set(instructions() or ()) or bf16_speed() > 1:
        return None
    return (
        f"--amp bf16: this CPU has no bf16 instructions, a convolution takes {1 / bf16_speed():.1f} times as long as "
        "in float32; --amp auto takes the faster one"
    )


def autocast(amp: str, device: torch.device) -> Any:
    """A reusable autocast context for a precision of `RuntimeConfig.amp`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(amp, device))
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@cache
def bf16_speed() -> float:
    """`compare_precisions` of a 3×3 convolution with its backward pass: some 20 to 100 ms, once in a process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 16, 16, generator=generator)
    weight = torch.randn(64, 64, 3, 3, generator=generator).requires_grad_()
    return compare_precisions(lambda: torch.autograd.grad(conv2d(x, weight, padding=1).float().sum(), weight))


def compare_precisions(step: Callable[[], object]) -> float:
    """Time of `step` in float32 over that in bf16, on this CPU.

    Taken in turn, the best of four, or of fewer once they took a second. The generator of the process is left as it
    was.
    """
    single, half = list[float](), list[float]()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        for _ in range(5):
            for times in (single, half):
                since = time.perf_counter()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=times is half):
                    step()
                times.append(time.perf_counter() - since)
            if sum(single) + sum(half) > ENOUGH:
                break
    return min(single[1:] or single) / min(half[1:] or half)  # the first of several prepares the kernels
