"""The rules of the package that no linter knows, and the picture drawn from it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "irgdistill"
FILES = sorted(PACKAGE.rglob("*.py"))


def nodes(path: Path, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))


def test_few_files_stand_beside_the_folders() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_no_module_imports_a_private_name_of_another() -> None:
    private = [
        f"{path.relative_to(ROOT)}: {node.module}.{alias.name}"
        for path in FILES
        for node in nodes(path, ast.ImportFrom)
        for alias in node.names  # type: ignore[attr-defined]
        if (node.module or "").startswith("irgdistill")  # type: ignore[attr-defined]
        and any(part.startswith("_") for part in [*node.module.split("."), alias.name] if part != "__version__")  # type: ignore[attr-defined]
    ]
    assert not private


def test_files_and_functions_are_short() -> None:
    long = [path.name for path in FILES if len(path.read_text().splitlines()) > 350]
    long += [
        f"{path.name}: {node.name}"  # type: ignore[attr-defined]
        for path in FILES
        for node in nodes(path, ast.FunctionDef)
        if node.end_lineno - node.lineno >= 60  # type: ignore[attr-defined]
    ]
    assert not long


def test_every_folder_says_what_it_is_and_what_it_exports() -> None:
    for folder in sorted({path.parent for path in FILES} - {PACKAGE}):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder
    for stub in PACKAGE.rglob("__init__.pyi"):
        module = ".".join(stub.parent.relative_to(ROOT).parts)
        tree = ast.parse(stub.read_text())
        imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        exported = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        assert set(exported) == imported, module


@pytest.mark.parametrize("stub", sorted(PACKAGE.rglob("__init__.pyi")), ids=lambda stub: stub.parent.name)
def test_every_export_exists(stub: Path) -> None:
    package = __import__(".".join(stub.parent.relative_to(ROOT).parts), fromlist=["_"])
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_the_picture_of_the_architecture_is_up_to_date() -> None:
    code = "import draw_architecture as d; assert d.draw() == d.PICTURE.read_text(), 'run docs/draw_architecture.py'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "docs")
