"""Commands that train nothing and need no network: what the machine can do, which presets there are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from irgdistill.cli_options import RESULT, complete_preset, option, options_of_distill, settings_of


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, option(RESULT, "--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what this machine has; with the options of `distill`, whether that run fits and what slows it down.

    Exit code 1: it does not fit.
    """
    from irgdistill.config import load_config

    refused = ("resume", "previous_state", "overwrite", "dry_run", "quiet")
    options = options_of_distill(context, "doctor", refused)
    config = load_config(options["preset"], list(options["settings"] or ()), settings_of(options))

    from irgdistill.doctor import diagnose, processes_of

    processes = processes_of(options["gpus"])
    if options["backend"] == "gloo":
        config.runtime.device = "cpu"
    if not diagnose(config, bool(context.args), options["output"], processes, as_json):
        raise typer.Exit(1)


def presets(
    name: Annotated[
        str | None,
        typer.Argument(help="Print this one.", show_default=False, autocompletion=complete_preset),
    ] = None,
    as_json: Annotated[bool, option(RESULT, "--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List the presets that come with irgdistill, or print one to copy and change."""
    from irgdistill.config import preset_files

    files = preset_files(name)
    texts = {path: path.read_text(encoding="utf-8") for path in files.values()}
    summaries = {path: text.partition("\n")[0].lstrip("# ") for path, text in texts.items()}
    if as_json:
        for known, path in files.items():
            values = {"name": known, "summary": summaries[path], "path": str(path), "text": texts[path]}
            typer.echo(json.dumps(values))
    elif name is not None:
        typer.echo("".join(texts.values()), nl=False)
        typer.echo(f"from {', '.join(map(str, texts))}", err=True)
    else:
        from rich.console import Console
        from rich.table import Table

        view = Table.grid("name", "summary", padding=(0, 2, 0, 0))
        view.columns[0].no_wrap, view.columns[0].style = True, "bold"
        for known, path in files.items():
            view.add_row(known, summaries[path])
        Console(highlight=False).print(view)
