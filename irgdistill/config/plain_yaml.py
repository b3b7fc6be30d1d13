"""Reads YAML that holds plain values only: null, true and false, numbers, text, lists and mappings."""

from __future__ import annotations

import os
from typing import Any

import yaml

PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


LONGEST = 64
"""Characters of a number at most."""


MOST = 100_000
"""Values of a text at most."""


class _PlainLoader(yaml.SafeLoader):
    """Knows no other types, and no tag that its value contradicts."""


def _construct(loader: _PlainLoader, node: yaml.Node) -> Any:
    kind = node.tag.rpartition(":")[2]
    if kind in ("int", "float") and len(str(node.value)) > LONGEST:
        raise yaml.constructor.ConstructorError(None, None, "a number with too many digits", node.start_mark)
    try:
        value = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
        if kind == "str" and "\0" in os.fsencode(value).decode("latin-1"):
            raise ValueError
        return value
    except yaml.YAMLError:
        raise
    except Exception:  # whatever PyYAML's constructors raise for `!!int z`, and text that no file name can hold
        raise yaml.constructor.ConstructorError(None, None, f"not of type {kind}", node.start_mark) from None


_PlainLoader.yaml_constructors = {
    None: yaml.SafeLoader.yaml_constructors[None],
    **{f"tag:yaml.org,2002:{kind}": _construct for kind in PLAIN},
}


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in (*PLAIN, "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """Parse YAML. Raises yaml.YAMLError for what is none, or is of another type."""
    try:
        value = yaml.load(text, _PlainLoader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    _check_size(value)
    return value


def _check_size(value: Any) -> None:
    """Count values as often as aliases repeat them: a value that holds itself has no end."""
    left, count = [value], 0
    while left:
        item = left.pop()
        count += 1
        if count > MOST:
            raise yaml.YAMLError(f"more than {MOST} values, or one that holds itself")
        if isinstance(item, (list, dict)):
            left.extend(item.values() if isinstance(item, dict) else item)
