"""The page of commands, made from the command line itself when the documentation is built."""

from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from irgdistill.cli.app import app


def on_files(files: Files, config: Any) -> Files:
    command = typer.main.get_command(app)
    context = command.make_context("irgdistill", [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="irgdistill", title="Commands")
    files.append(File.generated(config, "commands.md", content=text))
    return files
