"""Old names of settings, which presets, scripts and saved runs may still hold; settings that saved runs lack."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from irgdistill.errors import UserError

RENAMED_KEYS = {
    "data.hold_gib": "data.image_cache_gib",
    "runtime.fold": "runtime.fold_batch_norm",
    "runtime.share_every": "runtime.gradient_shares_every",
}
"""Old key -> new key."""


BEFORE = {"data.exif_orientation": False}
"""Settings that older versions lack -> what those versions did, where that is not the default."""


class RenamedKeyWarning(FutureWarning):
    """A key has another name now. The command line reports it as any warning of its own."""


def current_key(key: str) -> str:
    """The key's name of today. Warns about an old one."""
    if key not in RENAMED_KEYS:
        return key
    new = RENAMED_KEYS[key]
    warnings.warn(f"{key} is now called {new}", RenamedKeyWarning, stacklevel=1)  # one place: once per key
    return new


def current_keys(tree: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """A tree of settings, or that of one `section`, with the names of today. Warns about old ones.

    Raises UserError for a setting under both names.
    """
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{section}.{name}" if section else name
        new = current_key(path).rpartition(".")[2] if path in RENAMED_KEYS else name
        if new != name and new in tree:
            raise UserError(f"{path} is now called {RENAMED_KEYS[path]}; give one of them")
        found[new] = current_keys(value, name) if isinstance(value, Mapping) and not section else value
    return found


def with_earlier_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a saved run, with what its version did where it had no setting yet."""
    filled = dict(tree)
    for key, value in BEFORE.items():
        section, _, name = key.partition(".")
        below = filled.get(section, {})
        if isinstance(below, Mapping):
            filled[section] = {name: value, **below}
    return filled
