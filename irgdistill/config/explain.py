"""Validation errors in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from irgdistill.config.settings import keys
from irgdistill.errors import nearest

QUOTE = "'"


LONGEST = 100
"""Characters of a value that a message shows."""


WANTED = {
    **dict.fromkeys(("int_parsing", "int_parsing_size", "int_type", "int_from_float"), "expected a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "expected a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "expected true or false"),
    **dict.fromkeys(("dict_type", "model_type"), "expected keys with values"),
    **dict.fromkeys(("list_type", "tuple_type"), "expected a list, such as [A, B]"),
    "too_long": "expected two values, such as [A, B]",
    "path_type": "expected a path",
    "string_type": "expected text",
    "finite_number": "expected a finite number",
}
"""Kind of a pydantic error -> its message for users who may not know Python."""


def explain(errors: Iterable[Any], options: Mapping[str, str] | None = None) -> str:
    """Make one sentence per wrong key, whichever of its parts or alternatives pydantic reports.

    `options`: key -> the option that gave its value, which is then named in its place.
    """
    sentences: dict[str, list[str]] = {}
    known = set(keys())
    for error in errors:
        parts = [str(part) for part in error["loc"]]
        found = known if len(parts) < 3 else known - {"teachers"}  # an entry of it has keys of its own
        path = next((key for n in range(len(parts)) if (key := ".".join(parts[: n + 1])) in found), ".".join(parts))
        kind = error["type"]
        if kind == "missing" and parts[-1].isdecimal():
            kind = "too_long"
        if kind == "missing":
            sentences[f"{'.'.join(parts)} is missing"] = []
            continue
        if kind == "extra_forbidden":
            sentences[f"unknown key {path!r}{nearest(path, known)}"] = []
            continue
        allowed = error["msg"].removeprefix("Value error, ")
        if kind == "literal_error":
            words = error["ctx"]["expected"]
            allowed = f"expected {words}{nearest(str(error['input']), words.split(QUOTE)[1::2])}"
        allowed = WANTED.get(kind, allowed).replace("Input should be", "expected a value")
        given = _short(error["input"])
        what = f"{options[path]} {given.strip(QUOTE)}: " if options and path in options else f"{path} = {given}: "
        sentences.setdefault(what, []).append(f"{allowed[0].lower()}{allowed[1:]}")
    return "; ".join(what + ", or ".join(dict.fromkeys(why)) for what, why in sentences.items())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
