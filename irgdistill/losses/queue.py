"""The latest rows of the training batches, kept by a term from step to step."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """Ring buffers of equal length, by name. As buffers of an adapter they are in the state of a run.

    `empty`: the row with which each buffer begins. All processes must add the same rows.
    """

    start: Tensor

    def __init__(self, length: int, **empty: Tensor) -> None:
        super().__init__()
        self.length = length
        for name, row in empty.items():
            self.register_buffer(name, row.expand(length, *row.shape).clone())
        self.register_buffer("start", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def add(self, **rows: Tensor) -> None:
        """Replace the oldest rows by those of a training batch (B, …); of more than the length, the last are kept."""
        if not self.training:
            return
        count = min(self.length, *map(len, rows.values()))
        places = (self.start + torch.arange(count, device=self.start.device)) % self.length
        for name, values in rows.items():
            buffer = self.get_buffer(name)
            buffer.index_copy_(0, places, values[-count:].to(buffer))
        self.start.add_(count).remainder_(self.length)
