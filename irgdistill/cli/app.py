"""The command line: the app, its commands and exit codes.

A command is declared in a file of this folder and done in `irgdistill.commands`. Every error is one line on stderr;
bad input has exit code 2. Starts without torch.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from irgdistill.cli.options import COMMANDS, Declaration, WithSettings, is_unknown_option, rare_names
from irgdistill.config import PANELS, RenamedKeyWarning
from irgdistill.errors import Interrupted, UserError, nearest, os_reason
from irgdistill.runtime import Signals, Stopped, end_with_parent, is_worker, report_failure
from irgdistill.version import __version__

FEW = 24
"""Help of a command with more options leaves the rare ones to `--help-all`."""


HELP_ALL = "--help-all"


class Command(TyperCommand):
    """A command whose `--help` is short, and wastes no column on a narrow terminal."""

    rare: frozenset[str] = frozenset()
    """Names in Python of options that few runs need."""
    refused: Sequence[str] | None = None
    """See `Declaration`."""

    def get_help_option_names(self, context: Any) -> list[str]:
        return ["--help", HELP_ALL]

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        context.meta[HELP_ALL] = HELP_ALL in args
        return super().parse_args(context, args)

    def format_help(self, context: Any, formatter: Any) -> None:
        from typer import rich_utils

        if hasattr(rich_utils, PADDING):  # private to typer; without it the help is only wider
            setattr(rich_utils, PADDING, (0, 1, 0, 0))
        shown, rare = copy(self), self.rare
        shown.add_help_option = False
        if self.refused is not None:
            distill = context.parent.command.get_command(context.parent, "distill")
            own, rare = {parameter.name for parameter in self.params}, rare | distill.rare
            passed_on = [item for item in distill.params if item.name not in own.union(self.refused)]
            shown.params = sorted([*self.params, *passed_on], key=_panel)
        common = [parameter for parameter in shown.params if parameter.name not in rare]
        left = len(shown.params) - len(common)
        if len(shown.params) > FEW and left and not context.meta.get(HELP_ALL):
            shown.params = common
            shown.epilog = f"{self.epilog}\n\n{left} more options: {context.command_path} {HELP_ALL}"
        TyperCommand.format_help(shown, context, formatter)


def _panel(parameter: Any) -> int:
    """Place of an option's panel in the help."""
    panel = getattr(parameter, "rich_help_panel", None)
    return PANELS.index(panel) if panel in PANELS else -1


PADDING = "STYLE_OPTIONS_TABLE_PADDING"
"""typer's name for the padding of a panel's table."""


class Commands(TyperGroup):
    """Builds a command when it is asked for, and names the nearest one if there is none of that name."""

    def list_commands(self, context: Any) -> list[str]:
        return list(_declared())

    def get_command(self, context: Any, name: str) -> Any:
        declared = _declared()
        if name in declared:
            if name not in self.commands:
                self.commands[name] = _build(declared[name])
            return self.commands[name]
        if not context.resilient_parsing:
            raise UserError(f"no command {name!r}{nearest(name, declared)} (known: {', '.join(declared)})")
        return None

    def format_help(self, context: Any, formatter: Any) -> None:
        """Show every command with its docstring; their options are not built."""
        listed = {name: TyperCommand(name, help=declared.summary) for name, declared in _declared().items()}
        TyperGroup(
            name=self.name,
            commands=dict(listed),
            help=self.help,
            epilog=self.epilog,
            rich_markup_mode=self.rich_markup_mode,
            add_help_option=False,
        ).format_help(context, formatter)


def _examples(lines: Sequence[str]) -> str:
    return "\n\n".join((f"Example{'s' * (len(lines) > 1)}:", *lines))


app = typer.Typer(
    name="irgdistill",
    cls=Commands,
    help="Distil any timm teacher into any timm student with Instance Relationship Graphs.",
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=_examples(
        [
            "irgdistill train --preset quickstart --model cifar_resnet20",
            "irgdistill distill --teacher resnet50 --student mobilenetv2_100 --data ./imagenet",
        ]
    )
    + "\n\nOptions of a command: irgdistill COMMAND --help. Also: --version, --install-completion.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"irgdistill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@cache
def _declared() -> dict[str, Declaration]:
    """Import every file of this folder -> the commands that they declare, in their order."""
    for module in iter_modules([str(Path(__file__).parent)]):
        if module.name != "app":
            import_module(f"irgdistill.cli.{module.name}")
    return {declared.name: declared for declared in sorted(COMMANDS, key=lambda declared: declared.order)}


def _build(declared: Declaration) -> Any:
    """The command as typer parses it."""
    function, alone = declared.function, typer.Typer(add_completion=False, rich_markup_mode="rich")
    passed_on = None if declared.refused is None else {"allow_extra_args": True, "ignore_unknown_options": True}
    add = alone.command(declared.name, cls=Command, epilog=_examples(declared.examples), context_settings=passed_on)
    made = add(function.made() if isinstance(function, WithSettings) else function)
    command: Any = typer.main.get_command(alone)
    command.rare, command.refused = rare_names(made), declared.refused
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None  # its metavar says what it is
    return command


def commands() -> dict[str, Any]:
    """Every command as typer parses it, by its name."""
    return {name: _build(declared) for name, declared in _declared().items()}


USAGE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")
"""click's UsageError. typer keeps click in different places and exports only classes derived from this one."""


def main() -> None:
    """Run the command line, and turn errors into one line and an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    end_with_parent()
    try:
        with Signals(), _renamed_keys_reported():
            sys.exit(app(prog_name="irgdistill", standalone_mode=False) or 0)
    except USAGE_ERROR as error:
        _exit(usage(error), 2)
    except UserError as error:
        _exit(str(error), 2)
    except OSError as error:
        _exit(os_reason(error), 2)
    except Stopped as stop:
        _exit(str(stop), 128 + stop.number)
    except Interrupted as error:
        _exit(str(error), error.code)
    except Exception as error:
        if not report_failure(f"{type(error).__name__}: {error}\n{traceback.format_exc()}", 1):
            raise
        sys.exit(1)


def _exit(message: str, code: int) -> None:
    """Report why the command ends, from one of a run's processes only, and exit."""
    if not report_failure(message, code) and os.environ.get("RANK", "0") == "0":
        from irgdistill.io import visible

        typer.echo(f"irgdistill: {visible(message)}", err=True)
    sys.exit(code)


@contextmanager
def _renamed_keys_reported() -> Iterator[None]:
    """Report each setting under an old name once, as any other warning of a command."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", RenamedKeyWarning)
        show: Any = warnings.showwarning

        def report(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, RenamedKeyWarning):
                show(message, category, *where, **more)
            elif not is_worker() and os.environ.get("RANK", "0") == "0":
                from irgdistill.io import Report

                Report().warn(str(message))

        warnings.showwarning = report
        yield


def usage(error: Any) -> str:
    """A mistake in the options on one line: what was given, and the nearest names."""
    message = " ".join(error.format_message().split()).rstrip(".")
    if is_unknown_option(error):
        known = [name for parameter in error.ctx.command.get_params(error.ctx) for name in parameter.opts]
        return f"no option {error.option_name}{nearest(error.option_name, known)}"
    if type(error).__name__ == "MissingParameter":
        message += f"; for example: {_declared()[error.ctx.info_name].examples[0]}"
    given = _given(getattr(error, "param", None))
    if given and ": " in message:
        message = f"{given}: {message.partition(': ')[2]}"
    return f"{message[:1].lower()}{message[1:]}"


def _given(parameter: Any) -> str:
    """An option with its value as on the command line; empty if it is not there."""
    words = [word for argument in sys.argv[1:] for word in argument.split("=", 1)]
    names = [] if parameter is None else parameter.opts
    return next((f"{word} {value}" for word, value in pairwise(words) if word in names), "")
