"""Pages made from the code: all commands, all settings. The gallery shows the pictures that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import BaseModel

from irgdistill.cli.app import app
from irgdistill.config import RENAMED_KEYS, Config, Setting, settings

if TYPE_CHECKING:
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

COMMANDS = """This page lists every command with its options and examples. `compare`, `cache-teacher` and `doctor` take
the options of `distill` too."""

SETTINGS = """# All settings

This page lists every setting of a run, with its type, default and command-line option. A key is set in a YAML preset,
with `--set key.path=value`, or with its option. A resumed run may change the keys marked so; the others define the
result.
"""

COUNTS = {2: "two", 3: "three"}

PICTURE = re.compile(r"^!\[.*?\]\((images/.*?)\)", re.M)

RENAMED = """
## Renamed keys

Old names still work, in presets, with `--set` and in saved runs, with a warning.

"""


def on_files(files: Files, config: Any) -> Files:
    from mkdocs.structure.files import File

    files.append(File.generated(config, "commands.md", content=commands_page()))
    files.append(File.generated(config, "settings.md", content=settings_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    markdown = markdown.replace(" ± ", "\u00a0±\u00a0")  # a value and its deviation stay on one line
    return with_pictures(markdown, Path(config["docs_dir"])) if page.file.src_uri == "gallery.md" else markdown


def on_page_content(html: str, page: Page, config: Any, files: Files) -> str:
    """Marks the options of every code block, so that a line never breaks within one."""
    mark = partial(re.sub, r"(?<=[\s>])--?[a-z][-\w]*", r'<span class="option">\g<0></span>')
    return re.sub(r"<pre>.*?</pre>", lambda block: mark(block[0]), html, flags=re.S)


def with_pictures(markdown: str, folder: Path) -> str:
    """A page without the sections whose pictures are not in `folder`."""
    sections = re.split(r"^(?=## )", markdown, flags=re.M)
    return "".join(text for text in sections if all((folder / name).exists() for name in PICTURE.findall(text)))


def commands_page() -> str:
    """Every command with its options; its examples as console blocks."""
    from typer.cli import get_docs_for_click  # private to typer

    command = typer.main.get_command(app)
    context = command.make_context("irgdistill", [], resilient_parsing=True)
    page = get_docs_for_click(obj=command, ctx=context, name="irgdistill", title="All commands")
    page = page.replace("# All commands\n", f"# All commands\n\n{COMMANDS}\n", 1)
    for own in command.commands.values():  # typer cuts each at 45 characters
        page = page.replace(f": {own.get_short_help_str()}\n", f": {own.get_short_help_str(200)}\n", 1)
    return re.sub(r"^irgdistill .*$", r"```console\n\g<0>\n```", page, flags=re.M)


def settings_page() -> str:
    """Every setting with its type, default, option and docstring, as Markdown."""
    return (
        SETTINGS + "".join(_lines()) + RENAMED + "".join(f"- `{old}`: `{new}`\n" for old, new in RENAMED_KEYS.items())
    )


def _lines() -> Iterator[str]:
    section = None
    for setting, schema in sorted(_described(Config, ""), key=lambda described: "." in described[0].key):
        here = setting.key.partition(".")[0] if "." in setting.key else ""
        if here != section:
            section = here
            yield f"\n## {here or 'The run'}\n\n"
        yield f"`{setting.key}`\n:   {' '.join((setting.field.description or '').split())}\n"
        yield f"    {_facts(setting, schema)}\n\n"


def _described(section: type[BaseModel], prefix: str) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Settings with their JSON schemas; those of a list of sections follow it, and have no option of their own."""
    schema = section.model_json_schema()
    for setting in settings(section):
        properties = schema
        for name in setting.key.split("."):
            properties = _resolved(properties["properties"][name], schema)
        described = Setting(prefix + setting.key, setting.field, None if prefix else setting.flag)
        yield described, {**properties, "$defs": schema.get("$defs")}
        if setting.section is not None:
            yield from _described(setting.section, f"{prefix}{setting.key}.")


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = root["$defs"][name] if name else schema
    return found


def _facts(setting: Setting, schema: dict[str, Any]) -> str:
    default = setting.default
    facts = [f"Type: {_type(schema)}"]
    if setting.field.is_required():
        facts.append("required")
    elif default is not None:
        facts.append(f"default: `{_value(default)}`")
    if setting.flag is not None:
        facts.append(f"option: `{setting.flag.name}`")
    if setting.changeable:
        facts.append("a resumed run may change it")
    return "; ".join(facts) + "."


def _value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(item) for item in schema["anyOf"] if item.get("type") != "null"))
    if "enum" in schema or "const" in schema:
        return "one of " * ("enum" in schema) + ", ".join(
            f"`{item}`" for item in schema.get("enum", [schema.get("const")])
        )
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            return f"{COUNTS[len(schema['prefixItems'])]} values, {_type(schema['prefixItems'][0])}"
        return f"list of {_type(schema['items'])}"
    words = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "string": "text"}
    if schema.get("format") == "path":
        return "path"
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[name]}" for name, sign in bounds.items() if name in schema]
    return " ".join([words.get(str(kind), "keys with values"), " and ".join(limits)]).strip()
