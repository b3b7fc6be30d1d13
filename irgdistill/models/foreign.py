"""Finds the weights of a network in the content of a file that another program wrote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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

    The dictionaries may hold parts of the network, such as a backbone and a head. The second value names what was taken
    where several fit equally or a part was joined, else it is empty. If nothing has a key of the network, the weights
    are the largest dictionary as it is.
    """
    flat = {f"{place}.{key}" if place else key: x for place, tensors in dicts.items() for key, x in tensors.items()}
    parts = [part for place, tensors in (("", flat), *dicts.items()) for part in _parts(place, tensors, own)]
    found = list({part.place: part for part in parts}.values())
    if not found:
        return max(dicts.values(), key=len), ""
    most = max(part.fit for part in found)
    equal = [part for part in found if part.fit == most]
    taken = max(equal, key=lambda part: part.preference(role))
    rest, source = _beside(taken, flat, own)
    note = f"took {taken.place or 'the top level'}{source}"
    if len(equal) > 1:
        note += f" of {', '.join(part.place or 'the top level' for part in equal)}"
    return {**taken.tensors, **rest}, note if len(equal) > 1 or rest else ""


def _beside(taken: Found, flat: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """What `taken` lacks, such as a classifier, from a module beside it that holds nothing else, and in words which.

    Nothing if no module fits, or several do.
    """
    stem, lacking = _relative(key for key in own if key not in taken.tensors)
    above = taken.place.split(".") if taken.place else []
    while lacking and above:
        within, modules = above.pop(), dict[str, list[str]]()
        for key in flat:
            path = key.split(".")
            if path[: len(above)] == above and path[len(above)] != within:
                modules.setdefault(path[len(above)], []).append(key)
        fitting = list[tuple[str, dict[str, str]]]()
        for keys in modules.values():
            place, names = _relative(keys)
            if names.keys() == lacking.keys() and all(
                flat[key].shape[1:] == own[lacking[name]].shape[1:] for name, key in names.items()
            ):
                fitting.append((place, names))
        if len(fitting) == 1:
            place, names = fitting[0]
            return {lacking[name]: flat[key] for name, key in names.items()}, f" with {place} as {stem}"
        if fitting:
            break
    return {}, ""


def _relative(keys: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The module that all keys share, and the keys by their names in it."""
    paths = {key: key.split(".") for key in keys}
    longest, shared = min((len(path) - 1 for path in paths.values()), default=0), 0
    while shared < longest and len({path[shared] for path in paths.values()}) == 1:
        shared += 1
    module = ".".join(next(iter(paths.values()), [])[:shared])
    return module, {".".join(path[shared:]): key for key, path in paths.items()}


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
