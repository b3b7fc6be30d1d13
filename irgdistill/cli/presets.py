"""`irgdistill presets`"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from irgdistill.cli.completion import complete_preset
from irgdistill.cli.options import command, option
from irgdistill.config import RESULT


@command("presets", order=110, examples=["irgdistill presets", "irgdistill presets quickstart > mine.yaml"])
def presets(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Print this one.", show_default=False, autocompletion=complete_preset),
    ] = None,
    as_json: Annotated[bool, option(RESULT, "--json", help="Print one JSON object per line.")] = False,
) -> None:
    """List the presets of irgdistill, or print one to copy and change."""
    from irgdistill.config import preset_files
    from irgdistill.io import visible

    files = preset_files(name)
    texts = {path: path.read_text(encoding="utf-8") for path in files.values()}
    summaries = {path: text.partition("\n")[0].lstrip("# ") for path, text in texts.items()}
    if as_json:
        for known, path in files.items():
            values = {"name": known, "summary": summaries[path], "path": str(path), "text": texts[path]}
            typer.echo(json.dumps(values))
    elif name is not None:
        typer.echo("".join(texts.values()), nl=False)
        typer.echo(f"from {', '.join(map(visible, texts))}", err=True)
    else:
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text

        console = Console(highlight=False)
        for known, path in files.items():
            console.print(Text(visible(known), style="bold"))
            console.print(Padding(Text(visible(summaries[path])), (0, 0, 0, 2)))
