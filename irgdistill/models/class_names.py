"""Names of the classes that a network predicts, and their order."""

from __future__ import annotations

from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from irgdistill.models.network import Network
from irgdistill.models.weights import classifier_modules


def class_names(network: Network, pretrained: bool = False) -> list[str]:
    """The names that its checkpoint or its configuration on the Hub records, else the numbers from 0.

    `pretrained`: it has timm's own weights, whose names timm knows for the subsets of ImageNet by their size.
    """
    recorded = _recorded(network)
    if recorded is not None:
        return recorded
    subset = infer_imagenet_subset(network.model) if pretrained and network.from_timm else None
    if subset is not None:
        known = ImageNetInfo(subset)
        return [known.index_to_description(i) for i in range(network.num_classes)]
    return [str(i) for i in range(network.num_classes)]


def put_in_order(network: Network, classes: list[str]) -> str:
    """Leave the rows of the classifier that are these classes, in this order, and return in words what was done.

    The names are those that its checkpoint or its configuration on the Hub records, or ImageNet's identifiers
    (n01440764, …) for a network with as many classes as one of its subsets. The text is empty and the network unchanged
    if it names its classes like this already, or a name is missing or not unique.
    """
    names = _recorded(network)
    if names is None and (subset := infer_imagenet_subset(network.model)) is not None:
        names = ImageNetInfo(subset).label_names()
    heads = classifier_modules(network.model).values()
    if not heads or not classes or names in (None, classes) or len({*names}) != network.num_classes:
        return ""
    if not {*classes} <= {*names}:
        return ""
    rows = [names.index(name) for name in classes]
    for head in heads:
        for key, value in list(head.named_parameters(recurse=False)):
            setattr(head, key, nn.Parameter(value.detach()[rows], requires_grad=value.requires_grad))
        for width in {"out_features", "out_channels"} & vars(head).keys():
            setattr(head, width, len(rows))
    network.model.num_classes = len(rows)  # type: ignore[assignment]
    network.classes = classes
    if len(rows) == len(names):
        return f"{network.name}: its classes are put in the order of the data's"
    return f"{network.name}: of its {len(names):,} classes, the {len(rows):,} of the data are left, in the data's order"


def _recorded(network: Network) -> list[str] | None:
    recorded: Any = network.classes or network.cfg.get("label_names")
    return list(map(str, recorded)) if recorded is not None and len(recorded) == network.num_classes else None
