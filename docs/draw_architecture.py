"""Draws docs/images/architecture.svg from the code: `python docs/draw_architecture.py`.

Rows are the folders of the package in the order of the layers in pyproject.toml; a row's marks say which folders it
imports. Marks stand right of the diagonal only: a folder imports only from lines below it.
"""

from __future__ import annotations

import ast
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "irgdistill"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
ROW, LEFT, NAME, TEXT, CELL = 30, 18, 110, 560, 28
LONGEST = 90


def layers() -> list[list[str]]:
    """Folders and modules of each layer, top to bottom, as the import contract has them."""
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert contract is not None, "pyproject.toml holds no layers contract"
    return [re.split(r" [|:] ", line) for line in re.findall(r'"([^"]+)"', contract[1])]


def summary(name: str) -> str:
    """First sentence of a module's or folder's docstring."""
    path = PACKAGE / f"{name}.py"
    docstring = ast.get_docstring(ast.parse((path if path.exists() else PACKAGE / name / "__init__.py").read_text()))
    first = re.split(r"[.;](?:\s|$)", (docstring or "").replace("`", ""))[0].replace("\n", " ")
    return first if len(first) <= LONGEST else first.partition(":")[0]


def imports(name: str) -> set[str]:
    """Folders and modules of the package that one of them imports."""
    path = PACKAGE / f"{name}.py"
    found: set[str] = set()
    for file in [path] if path.exists() else (PACKAGE / name).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {module.split(".")[1] for module in modules if module.startswith("irgdistill.")}
    return found - {name}


def draw() -> str:
    """The picture as SVG."""
    order = [name for layer in layers() for name in layer]
    height, first = ROW * len(order) + 84, LEFT + NAME + TEXT
    width = first + CELL * len(order) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
    ]
    row = 0
    for number, layer in enumerate(layers()):
        top = 12 + ROW * row
        fill = "#eef3f8" if number % 2 == 0 else "#f8fafc"
        parts.append(
            f'<rect x="8" y="{top}" width="{width - 16}" height="{ROW * len(layer) - 3}" rx="4" fill="{fill}"/>'
        )
        for name in layer:
            y, used = 12 + ROW * row + 18, imports(name)
            kind = "" if (PACKAGE / f"{name}.py").exists() else "/"
            parts.append(f'<text x="{LEFT}" y="{y}" font-weight="bold" fill="#1b3a57">{name}{kind}</text>')
            parts.append(f'<text x="{LEFT + NAME}" y="{y}" fill="#222222">{escape(summary(name))}</text>')
            x = first + CELL * row + 4
            parts.append(f'<rect x="{x}" y="{y - 14}" width="{CELL - 8}" height="19" rx="3" fill="#1b3a57"/>')
            for column, other in enumerate(order):
                if other in used:
                    middle = first + CELL * column + CELL // 2
                    parts.append(f'<circle cx="{middle}" cy="{y - 5}" r="5" fill="#c4621b"/>')
            row += 1
    bottom = 12 + ROW * row + 18
    parts.append(f'<text x="{LEFT + NAME}" y="{bottom}" fill="#666666">a mark: this row imports that column</text>')
    parts += [
        f'<text x="{x}" y="{bottom}" font-size="11" text-anchor="end" transform="rotate(-50 {x} {bottom})" '
        f'fill="#444444">{name}</text>'
        for x, name in ((first + CELL * column + CELL // 2, name) for column, name in enumerate(order))
    ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(PICTURE.relative_to(ROOT))
