"""Classes of unequal size: how often their images are drawn, and what they weigh in the cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from irgdistill.errors import UserError


def draw_balanced(labels: Tensor, count: int, epoch: int, generator: torch.Generator) -> Tensor:
    """Keys (count,) of one epoch over images with `labels` (N,): every class equally often, in random order.

    Classes differ by one draw at most, and which have one more is drawn too. Within a class every image is drawn
    equally often, again up to one. A key is position + N · number and no two are equal in a run, so that an image that
    comes again is augmented anew.
    """
    present = labels.unique()
    present = present[torch.randperm(len(present), generator=generator)]
    share, more = divmod(count, len(present))
    sizes = torch.bincount(labels)
    copies = -(-(share + 1) // int(sizes[sizes > 0].min()))
    keys = []
    for place, label in enumerate(present):
        members = (labels == label).nonzero().flatten()
        wanted = share + (place < more)
        for copy in range(-(-wanted // len(members))):
            taken = members[torch.randperm(len(members), generator=generator)][: wanted - copy * len(members)]
            keys.append(taken + len(labels) * (epoch * copies + copy))
    drawn = torch.cat(keys)
    return drawn[torch.randperm(len(drawn), generator=generator)]


def balanced_weights(labels: Sequence[int], classes: Sequence[str]) -> list[float]:
    """One weight for each class, N / (K · images of it): inverse frequency, mean 1 over the N images.

    Raises UserError for a class without images.
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=len(classes))
    if not counts.all():
        empty = classes[int((counts == 0).nonzero()[0])]
        raise UserError(f"losses.ce.class_weights = balanced: class {empty!r} has no training images")
    return [len(labels) / (len(classes) * int(count)) for count in counts]
