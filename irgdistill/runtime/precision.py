"""Precision of a run: what `auto` is on a device, and how fast bf16 is on this CPU."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d

CPUINFO = Path("/proc/cpuinfo")

AMX = {"amx_bf16"}
"""Tile instructions: with them bf16 is certain to be faster."""


UNITS = AMX | {"avx512_bf16", "bf16", "svebf16"}
"""Instructions for bf16 products of x86 and ARM processors, as Linux names them."""


WIDE = ("avx2", "avx512f", "avx512_vnni", "avx512_fp16", "asimd", "sve", "sve2", "i8mm", *sorted(UNITS))
"""Instructions that decide how fast a network is on a CPU."""


WITHOUT_UNITS = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ONEDNN_MAX_CPU_ISA that keep oneDNN, which computes torch's convolutions, from the bf16 instructions."""


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


def resolve_precision(amp: str, device: torch.device) -> str:
    """What a precision of `RuntimeConfig.amp` is on a device: none, bf16 or fp16.

    `auto` is what the device multiplies fastest. On GPUs bf16, or fp16 where they have no units for it. On a CPU
    without bf16 instructions none, with AMX bf16; on others the faster of both in a short measurement.
    """
    if amp != "auto":
        return amp
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type != "cpu":
        return "none"
    found = instructions()
    if found is not None and not UNITS & set(found):
        return "none"
    return "bf16" if (found is not None and AMX & set(found)) or bf16_speed() > 1 else "none"


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
    """Time of a 3×3 convolution with its backward pass in float32, over that in bf16, on this CPU: some 20 to 100 ms.

    Measured once in a process, in turn, the best of four, or of one where that leaves no doubt. No generator of the
    process is touched.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 16, 16, generator=generator)
    weight = torch.randn(64, 64, 3, 3, generator=generator).requires_grad_()
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    with torch.enable_grad():
        for turn in range(5):
            for dtype in best:
                since = time.perf_counter()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                    y = conv2d(x, weight, padding=1)
                torch.autograd.grad(y.float().sum(), weight)
                if turn:  # the first prepares the kernels
                    best[dtype] = min(best[dtype], time.perf_counter() - since)
            if turn and 3 * best[torch.float32] < best[torch.bfloat16]:
                break
    return best[torch.float32] / best[torch.bfloat16]
