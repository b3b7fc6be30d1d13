"""Names of the classes that a network predicts."""

from __future__ import annotations

from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from irgdistill.models.network import Network


def class_names(network: Network, pretrained: bool = False) -> list[str]:
    """The names that its checkpoint or its configuration on the Hub records, else the numbers from 0.

    `pretrained`: it has timm's own weights, whose names timm knows for the subsets of ImageNet by their size.
    """
    recorded: Any = network.classes or network.cfg.get("label_names")
    if recorded is not None and len(recorded) == network.num_classes:
        return list(map(str, recorded))
    subset = infer_imagenet_subset(network.model) if pretrained and network.from_timm else None
    if subset is not None:
        known = ImageNetInfo(subset)
        return [known.index_to_description(i) for i in range(network.num_classes)]
    return [str(i) for i in range(network.num_classes)]
