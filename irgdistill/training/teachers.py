"""The teachers of a step: each a live network or a cache, and all of them as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from irgdistill.losses import with_mean_logits
from irgdistill.matching import Output, Tapped
from irgdistill.training.teacher_cache import TeacherCache


class Teacher(Protocol):
    """Answers for a teacher: `LiveTeacher` or `CachedTeacher`."""

    network: Tapped | None
    """The frozen network; None for a cache, which holds its answers alone."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a cached row; 0 without a cache."""

    def __call__(self, images: Tensor, rows: Tensor | None) -> Output:
        """images (B, 3, H, W) of a step, with the cache's rows (B, n) for them -> logits and features."""


class LiveTeacher:
    """A frozen network that runs on the images of each step.

    `remembers`: it keeps its last answer, for runs that take turns on the same images.
    """

    def __init__(self, network: Tapped, remembers: bool = False) -> None:
        self.network: Tapped | None = network
        self._forward, self._remembers = network, remembers
        self._last: tuple[Tensor, Output] | None = None

    @property
    def row_bytes(self) -> int:
        return 0

    def __call__(self, images: Tensor, rows: Tensor | None = None) -> Output:
        if self._last is not None and self._last[0] is images:
            return self._last[1]
        output = self._run(images)
        self._last = (images, output) if self._remembers else None
        return output

    @torch.no_grad()
    def _run(self, images: Tensor) -> Output:
        output: Output = self._forward(images)
        return output


class CachedTeacher:
    """The rows of a teacher cache, which the loader brings with the images."""

    def __init__(self, cache: TeacherCache) -> None:
        self.network: Tapped | None = None
        self.cache = cache

    @property
    def row_bytes(self) -> int:
        return self.cache.row_bytes

    def __call__(self, images: Tensor, rows: Tensor | None = None) -> Output:
        assert rows is not None, "the loader brings the rows of a teacher cache"
        return self.cache.output(rows)


class Teachers:
    """All teachers of a run, in its order. The loader brings the rows of their caches side by side.

    `answers`: which have the data's classes. The logits of each output are the mean of theirs, weighted by `weights`.
    """

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float], answers: Sequence[bool]) -> None:
        self.members, self.weights, self.answers = members, weights, answers

    @property
    def network(self) -> Tapped | None:
        """The first teacher's network, None for a cache: what the student is evaluated against."""
        return self.members[0].network

    @property
    def networks(self) -> list[Tapped]:
        return [member.network for member in self.members if member.network is not None]

    def cached_rows(self) -> CachedRows | None:
        """What the loader brings: the rows of the caches, if there is any."""
        caches = [member.cache for member in self.members if isinstance(member, CachedTeacher)]
        return CachedRows(caches) if caches else None

    def __call__(self, images: Tensor, rows: Tensor | None = None) -> list[Output]:
        """images (B, 3, H, W) of a step, with the cached rows (B, n) for them -> the output of each teacher."""
        outputs, start = list[Output](), 0
        for member in self.members:
            end = start + member.row_bytes
            outputs.append(member(images, None if rows is None else rows[:, start:end]))
            start = end
        return with_mean_logits(outputs, self.weights, self.answers)


class CachedRows:
    """The rows of several caches side by side, for the loader."""

    def __init__(self, caches: Sequence[TeacherCache]) -> None:
        self.caches = caches

    def __call__(self, keys: Sequence[int]) -> Tensor:
        """(B, n) bytes of the images with these keys."""
        return torch.cat([cache.teacher_rows(keys) for cache in self.caches], 1)
