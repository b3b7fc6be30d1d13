"""Order of the training images, and corrections for classes of unequal size: balanced draws and class weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from irgdistill.errors import UserError
from irgdistill.runtime import World


class EpochSampler(torch.utils.data.Sampler[int]):
    """Keys of this process's part of each batch of `epoch`, from batch `start` on, shuffled by (seed, epoch).

    The parts of all processes make up the batches that a single process would draw. Each part takes as many keys from
    the front of a batch as from its back, in mirror order: mixup pairs the first image with the last.

    With `labels` (length,), every class is drawn equally often. With `views`, keys repeat after that many epochs.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        world: World,
        labels: Tensor | None = None,
        views: int | None = None,
    ) -> None:
        self.length = length
        self.views = views
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        share = batch_size // world.size
        front, back = share // 2, share - share // 2
        self.part = [
            *range(world.rank * front, (world.rank + 1) * front),
            *range(batch_size - (world.rank + 1) * back, batch_size - world.rank * back),
        ]
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        )
        count = self.length // self.batch_size * self.batch_size
        if self.labels is None:
            order = torch.randperm(self.length, generator=generator) + self.epoch * self.length
        else:
            order = draw_balanced(self.labels, count, self.epoch, generator)
        if self.views is not None:
            order %= self.views * self.length
        batches = order[:count].view(-1, self.batch_size)
        return iter(batches[self.start :, self.part].flatten().tolist())

    def __len__(self) -> int:
        return (self.length // self.batch_size - self.start) * len(self.part)


def draw_balanced(labels: Tensor, count: int, epoch: int, generator: torch.Generator) -> Tensor:
    """Keys (count,) of one epoch over images with `labels` (N,), in random order, every class equally often.

    Classes differ by at most one draw, and so do the images of a class; which are drawn more often is random. A key is
    position + N · number and occurs once in a run, so that a repeated image gets another augmentation.
    """
    present = labels.unique()
    present = present[torch.randperm(len(present), generator=generator)]
    share, extra = divmod(count, len(present))
    sizes = torch.bincount(labels)
    copies = -(-(share + 1) // int(sizes[sizes > 0].min()))
    keys = []
    for place, label in enumerate(present):
        members = (labels == label).nonzero().flatten()
        wanted = share + (place < extra)
        for copy in range(-(-wanted // len(members))):
            taken = members[torch.randperm(len(members), generator=generator)][: wanted - copy * len(members)]
            keys.append(taken + len(labels) * (epoch * copies + copy))
    drawn = torch.cat(keys)
    return drawn[torch.randperm(len(drawn), generator=generator)]


def balanced_weights(labels: Sequence[int], classes: Sequence[str]) -> list[float]:
    """Inverse frequencies: N / (K · images of the class) for each of the K classes, with mean 1 over the N images.

    Raises UserError for a class without images.
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=len(classes))
    if not counts.all():
        empty = classes[int((counts == 0).nonzero()[0])]
        raise UserError(f"losses.ce.class_weights = balanced: class {empty!r} has no training images")
    return [len(labels) / (len(classes) * int(count)) for count in counts]
