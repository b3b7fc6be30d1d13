"""What the commands share: the table of options, panels, completion of values. Starts without torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from irgdistill.config import FLAGS
from irgdistill.errors import UserError, nearest

NETWORKS, DATA, MATCHING, METHOD, TRAINING, RUNTIME = "Networks", "Data", "Matching", "Method", "Training", "Run"


RESULT = "Result"


def option(group: str, *names: str, help: str, complete: Callable[[str], list[str]] | None = None) -> Any:
    """An option in the panel `group`; `complete` gives the values that begin like the one being typed."""
    return typer.Option(*names, help=help, rich_help_panel=group, show_default=False, autocompletion=complete)


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of `distill` -> {"key.path": value} of what was given. Raises UserError for two starts."""
    if params["student_pretrained"] and params["student_checkpoint"]:
        raise UserError("--student-pretrained and --student-checkpoint: a student starts from one or the other")
    given = {name: value for name, value in params.items() if name in FLAGS and value not in (None, (), [])}
    flags = {FLAGS[name]: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    if params["skip_teacher_check"]:
        flags["teacher.check"] = False
    if params["no_labels"]:
        flags["data.labels"] = False
    return flags


def options_of_distill(context: typer.Context, command: str, refused: tuple[str, ...]) -> dict[str, Any]:
    """What `command` was given beside its own options, read as `distill` reads it. Raises UserError for `refused`."""
    assert context.parent is not None
    parser = context.parent.command.get_command(context.parent, "distill")  # type: ignore[attr-defined]
    try:
        options: dict[str, Any] = parser.make_context(command, list(context.args), parent=context.parent).params
    except Exception as caught:
        error: Any = caught
        if not hasattr(error, "possibilities"):
            raise
        own = [name for parameter in (*context.command.params, *parser.params) for name in parameter.opts]
        known = [name for name in own if name.strip("-").replace("-", "_") not in refused]
        raise UserError(f"no option {error.option_name}{nearest(error.option_name, known)}") from None
    for name in refused:
        if options[name]:
            raise UserError(f"{command} does not take --{name.replace('_', '-')}")
    return options


def examples(*lines: str) -> str:
    """What stands below a command's help."""
    return "\n\n".join((f"Example{'s' * (len(lines) > 1)}:", *lines))


class Command(TyperCommand):
    """Its help wastes no column on a narrow terminal."""

    def format_help(self, context: Any, formatter: Any) -> None:
        from typer import rich_utils

        rich_utils.STYLE_OPTIONS_TABLE_PADDING = (0, 1, 0, 0)  # type: ignore[assignment]
        super().format_help(context, formatter)


class Commands(TyperGroup):
    """Of an unknown command it names the nearest."""

    def get_command(self, context: Any, name: str) -> Any:
        found = super().get_command(context, name)
        if found is None and not context.resilient_parsing:
            known = ", ".join(self.commands)
            raise UserError(f"no command {name!r}{nearest(name, self.commands)} (known: {known})")
        return found


def usage(error: Any) -> str:
    """A mistake in the options in one line: what was given, the nearest names, where they are listed."""
    message = " ".join(error.format_message().split()).rstrip(".")
    if hasattr(error, "possibilities"):
        known = [name for parameter in error.ctx.command.params for name in parameter.opts]
        return f"no option {error.option_name}{nearest(error.option_name, known)}"
    given = _given(getattr(error, "param", None))
    if given and ": " in message:
        message = f"{given}: {message.partition(': ')[2]}"
    return f"{message[:1].lower()}{message[1:]}"


def _given(parameter: Any) -> str:
    """An option with its value, as the command line has it; empty for what is not there."""
    words = [word for argument in sys.argv[1:] for word in argument.split("=", 1)]
    names = [] if parameter is None else parameter.opts
    return next((f"{word} {value}" for word, value in pairwise(words) if word in names), "")
