"""The documentation builds without a warning, and has every command and every setting."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from pydantic import BaseModel

from irgdistill.cli.app import commands
from irgdistill.config import RENAMED_KEYS, Config, keys, settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stderr
    for page in ("choosing", "commands", "settings"):
        assert (tmp_path / "site" / page / "index.html").stat().st_size > 5000
    assert (tmp_path / "site" / "search" / "search_index.json").exists()


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert len(PAGES) > 8
    for page in PAGES:
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_from_outside_lead_to_headings(name: str) -> None:
    """Those between pages are checked when the documentation is built."""
    links = re.findall(r"\]\((docs/[^)#]+)#?([^)]*)", (ROOT / name).read_text(encoding="utf-8"))
    assert links
    for page, anchor in links:
        assert (ROOT / page).exists(), page
        headings = re.findall(r"^#+ (.*)", (ROOT / page).read_text(encoding="utf-8"), re.M) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, f"{page}#{anchor}"


def test_the_page_of_commands_has_every_command_with_its_examples() -> None:
    page = hooks().commands_page()
    for name, command in commands().items():
        assert f"\n## `irgdistill {name}`\n" in page
        for example in re.findall(r"^irgdistill .*", command.epilog, re.M):
            assert f"\n```console\n{example}\n```\n" in page


def test_no_summary_of_a_command_is_cut() -> None:
    summaries = hooks().commands_page().partition("**Commands**")[2].partition("\n## ")[0]
    assert "* `export`: " in summaries and "..." not in summaries


def test_a_line_of_a_code_block_never_breaks_within_an_option() -> None:
    html = "<p>a --b</p><pre><code>run --lr-base 1 -b 2 a-b <i></i>--c</code></pre>"
    option = '<span class="option">{}</span>'.format
    marked = f"run {option('--lr-base')} 1 {option('-b')} 2 a-b <i></i>{option('--c')}"
    assert hooks().on_page_content(html, None, None, None) == f"<p>a --b</p><pre><code>{marked}</code></pre>"


def test_what_replaces_an_option_of_timm_exists() -> None:
    """The second column of the tables names options of `distill` and keys."""
    text = (ROOT / "docs" / "from_timm.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| `--")]
    options = {name for parameter in commands()["distill"].params for name in parameter.opts}
    assert len(cells) > 40
    for cell in cells:
        assert set(re.findall(r"--[a-z-]+", cell)) <= options, cell
        for key in re.findall(r"--set ([\w.]+)=", cell):
            assert key in keys() or key.startswith("student.args."), cell


def test_a_section_of_the_gallery_is_left_out_without_its_picture(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "here.png").touch()
    head, here, gone = "# Gallery\n\n", "## One\n\n![a](images/here.png)\n\n", "## Two\n\n![b](images/gone.png)\n\n"
    last = "## Three\n\nNo picture.\n"
    assert hooks().with_pictures(head + here + gone + last, tmp_path) == head + here + last


def test_the_page_of_settings_has_every_key_with_its_docstring() -> None:
    page, texts = hooks().settings_page(), described(Config, "")
    assert {"student.preprocessing.std", "losses.kd.temperature", "seed"} <= texts.keys() and len(texts) > 100
    for key, text in texts.items():
        assert text, f"{key} has no docstring"
        assert f"\n`{key}`\n:   {' '.join(text.split())}\n" in page
    for setting in settings():
        entry = page.partition(f"\n`{setting.key}`\n")[2].partition("\n\n")[0]
        assert "Type: " in entry
        assert setting.flag is None or f"option: `{setting.flag.name}`" in entry
        assert ("a resumed run may change it" in entry) == setting.changeable
    assert "Type: number > 0; default: `4`; option: `--temperature`." in page
    assert all(f"- `{old}`: `{new}`\n" in page for old, new in RENAMED_KEYS.items())
    assert "Type: one of `auto`, `none`, `bf16`, `fp16`; default: `auto`; option: `--amp`." in page


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def described(section: type[BaseModel], prefix: str) -> dict[str, str | None]:
    """Every field below a section, found by itself, and its docstring."""
    found: dict[str, str | None] = {}
    for name, field in section.model_fields.items():
        parts = (field.annotation, *get_args(field.annotation))
        below = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        for part in below:
            found |= described(part, f"{prefix}{name}.")
        if not below:
            found[prefix + name] = field.description
    return found
