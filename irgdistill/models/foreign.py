"""Finds the weights of a network in the content of a file that another program wrote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

Role = Literal["teacher", "student"]
ROLES: frozenset[str] = frozenset(("teacher", "student"))


AVERAGED = frozenset(("ema", "swa", "averaged"))
"""Words in the name of weights that were averaged over the training."""


DEPTH = 6
"""Containers within containers that are searched; it also ends a dictionary that holds itself."""


class Found(NamedTuple):
    """Tensors with one prefix in one dictionary, under the keys of the network."""

    place: str
    """The keys that lead to them, and their prefix, joined by dots."""
    tensors: dict[str, Tensor]
    fit: int
    """Tensors that the network has, minus those that it does not have."""

    def preference(self, role: Role) -> tuple[int, bool]:
        """Rank among weights that fit equally: those of the role first, then averaged ones."""
        words = set(re.split(r"[._]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", self.place).lower()))
        return (role in words) - bool(words & (ROLES - {role})), bool(words & AVERAGED)


def tensor_dicts(content: object, place: str = "", depth: int = DEPTH) -> dict[str, dict[str, Tensor]]:
    """Find the dictionaries with tensors in nested dictionaries: the keys that lead to each, joined by dots -> it."""
    if not isinstance(content, Mapping) or not depth:
        return {}
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    found = {place: tensors} if tensors else {}
    for key, value in content.items():
        found |= tensor_dicts(value, f"{place}.{key}" if place else str(key), depth - 1)
    return found


def find_weights(
    dicts: Mapping[str, dict[str, Tensor]], own: Mapping[str, Tensor], role: Role
) -> tuple[dict[str, Tensor], str]:
    """Find the weights of a network whose state dict is `own`, without the prefix of their keys.

    The second value names what was taken where several fit equally, else it is empty. If nothing has a key of the
    network, the weights are the largest dictionary as it is.
    """
    found = [part for place, tensors in dicts.items() for part in _parts(place, tensors, own)]
    if not found:
        return max(dicts.values(), key=len), ""
    most = max(part.fit for part in found)
    equal = [part for part in found if part.fit == most]
    taken = max(equal, key=lambda part: part.preference(role))
    places = ", ".join(part.place or "the top level" for part in equal)
    return taken.tensors, f"took {taken.place or 'the top level'} of {places}" if len(equal) > 1 else ""


def _parts(place: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[Found]:
    """Tensors for each prefix that makes keys of `own` into keys of `tensors`."""
    prefixes = Counter(prefix for key in tensors for prefix in _prefixes(key) if key[len(prefix) :] in own)
    most = max(prefixes.values(), default=0)
    for prefix, count in prefixes.items():
        if 2 * count < most:  # a block whose layers are named like those of the whole network
            continue
        part = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        # the first dimension of a classifier is the number of classes, which may differ
        hits = sum(key in own and own[key].shape[1:] == value.shape[1:] for key, value in part.items())
        yield Found(".".join(filter(None, (place, prefix.rstrip(".")))), part, 2 * hits - len(part))


def _prefixes(key: str) -> Iterator[str]:
    yield ""
    for dot in re.finditer(r"\.", key):
        yield key[: dot.end()]
