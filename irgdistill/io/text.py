"""Text that is not ours, such as names of files and classes, made safe to show."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that are not seen, but change what is: control, format, surrogate, line ends."""


JOINERS = "\u200c\u200d"
"""Format characters that belong to ordinary words and emoji."""


def visible(text: object) -> str:
    r"""`text` on one line, in which every hidden character is written as an escape, such as `\x1b`, `\n` or `\u202e`.

    A byte of a file name that is not UTF-8 is written as that byte, such as `\xff`.
    """
    text = str(text)
    return text if text.isprintable() else "".join(map(_escaped, text))


def visible_values(value: Any) -> Any:
    """A tree of plain values whose texts are all `visible`."""
    if isinstance(value, dict):
        return {visible_values(key): visible_values(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [visible_values(inner) for inner in value]
    return visible(value) if isinstance(value, str) else value


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in HIDDEN or character in JOINERS:
        return character
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # how Python holds a byte that is not UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(text: object) -> str:
    """`text` as words of Markdown, in which nothing is markup or HTML. `markdown_table` escapes the bars."""
    return re.sub(r"[\\`*_{}\[\]<>#~$&]", r"\\\g<0>", visible(text))


def code_span(text: object) -> str:
    """`text` as a code span, between more backticks than it has."""
    shown = visible(text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    space = " " * (shown[:1] == "`" or shown[-1:] == "`")
    return f"{'`' * (longest + 1)}{space}{shown}{space}{'`' * (longest + 1)}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of Markdown, the first the heads, as a table."""
    first, *others = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n" for row in rows]
    return first + "|" + "---|" * len(rows[0]) + "\n" + "".join(others)
