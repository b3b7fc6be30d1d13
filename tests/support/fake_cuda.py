"""Tensors that claim to be on a GPU where there is none: shapes, types and devices follow, values do not.

A tensor made without `device=` stays on the CPU, and an operator on both raises. `Module.to` is replaced: torch's own
asks the driver. The backward pass does, too: it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = torch.device("cuda", 0)


def move(module: nn.Module, *args: Any, memory_format: Any = torch.preserve_format, **_: Any) -> nn.Module:
    """`Module.to`, with fake tensors of the same shapes."""
    device = next((torch.device(arg) for arg in args if isinstance(arg, (str, torch.device))), None)
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, value in kept.items():
                if value is not None:
                    kept[name] = _faked(value, device or value.device, memory_format)
    return module


def _faked(value: Tensor, device: torch.device, memory_format: Any) -> Tensor:
    layout = memory_format if value.dim() == 4 else torch.preserve_format
    fake = torch.empty(value.shape, dtype=value.dtype, device=device)
    fake = fake if layout is torch.preserve_format else fake.contiguous(memory_format=layout)
    return nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Within, `cuda:0` is there, with units for bf16."""
    # The mode looks for a GPU when it is entered, and replaces the guard of its device if there is none.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, monkeypatch.context() as patch:
        patch.setattr(fake_tensor, "init_gpu_context", lambda *_: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(nn.Module, "to", move)
        generator = torch.Generator
        patch.setattr(torch, "Generator", lambda device="cpu": generator())
        yield mode
