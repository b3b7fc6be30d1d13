"""Options of the commands, made from the schema of the settings, and the list of commands. Starts without torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin

import typer

from irgdistill.cli.completion import (
    complete_logger,
    complete_method,
    complete_network,
    complete_source,
    logger_names,
    source_names,
)
from irgdistill.config import NETWORKS, PANELS, RESULT, Flag
from irgdistill.errors import UserError, nearest

if TYPE_CHECKING:
    from irgdistill.config import Config, Setting

COMPLETION: Mapping[str, Callable[..., list[str]]] = {
    "logger": complete_logger,
    "method": complete_method,
    "network": complete_network,
    "source": complete_source,
}


Function = Callable[..., None]


Declared = TypeVar("Declared", bound="Function | WithSettings")


@dataclass(frozen=True)
class Declaration:
    """A command as its file declares it."""

    name: str
    order: int
    """Its place in the help."""
    examples: Sequence[str]
    function: Function | WithSettings
    refused: Sequence[str] | None
    """The command takes the options of `distill` but these, by `options_of_distill`; None: it takes its own only."""

    @property
    def summary(self) -> str:
        function = self.function.function if isinstance(self.function, WithSettings) else self.function
        return inspect.getdoc(function) or ""


COMMANDS: list[Declaration] = []


def command(
    name: str, order: int, examples: Sequence[str], refused: Sequence[str] | None = None
) -> Callable[[Declared], Declared]:
    """Register a function of this package as the command `name`. See `Declaration` for the rest."""

    def register(function: Declared) -> Declared:
        COMMANDS.append(Declaration(name, order, examples, function, refused))
        return function

    return register


class Rare:
    """Marks an option that few runs need: of a long list, only `--help-all` shows it."""


RARE = Rare()


def option(
    panel: str, *names: str, help: str, metavar: str = "", complete: Callable[..., list[str]] | None = None
) -> Any:
    """An option in a panel of the help; `complete` returns the values that begin with the one being typed.

    `metavar`: what its value is; empty for a switch.
    """
    return typer.Option(
        *names,
        help=help,
        rich_help_panel=panel,
        show_default=False,
        metavar=metavar,
        autocompletion=complete,
    )


Quiet = Annotated[bool, option(RESULT, "--quiet", help="Print results, warnings and errors only.")]


CODE = "Python file whose function made a network, or that adds a data source; may be repeated."
"""Help of --plugin where a checkpoint is read: the function of a network runs only if its file is named."""


PREPROCESSING: Mapping[str, Flag] = {
    f"student.preprocessing.{key}": Flag(name, NETWORKS, text, metavar=metavar)
    for key, name, text, metavar in (
        ("mean", "--mean", "Of pixels in [0, 1]: R,G,B or one number.", "R,G,B"),
        ("std", "--std", "Of pixels in [0, 1]: R,G,B or one number.", "R,G,B"),
        ("interpolation", "--interpolation", "bilinear, bicubic, ….", "MODE"),
        ("crop_pct", "--crop-pct", "Share of the image that validation crops.", "SHARE"),
    )
}
"""Flags of a command with one network, by key."""


Json = Annotated[bool, option(RESULT, "--json", help="Print one JSON object.")]


@dataclass(frozen=True)
class WithSettings:
    """A function to which `made` gives the options of some settings, once the command is asked for.

    Until then the schema of the settings is not loaded, which takes longer than the rest of the command line.
    """

    function: Function
    chosen: Mapping[str, str | Flag | None]
    others: bool
    without: tuple[str, ...]

    def made(self) -> Function:
        from irgdistill.config import options, settings, values_of

        known = {setting.key: setting for setting in settings()}
        keys = dict.fromkeys(self.chosen)
        if self.others:
            have = [setting.key for setting in options().values()]
            keys |= dict.fromkeys(key for key in have if not key.startswith(self.without))
        taken = [_with_flag(known[key], self.chosen.get(key)) for key in keys]
        names = {setting.flag.parameter: setting for setting in taken if setting.flag is not None}

        def call(**params: Any) -> None:
            self.function(given=values_of({name: params.pop(name) for name in names}, names), **params)

        own = inspect.signature(self.function, eval_str=True).parameters.values()
        parameters = [*map(_parameter, names.values()), *(item for item in own if item.name != "given")]
        parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in sorted(parameters, key=_panel)]
        call.__doc__, call.__module__ = self.function.__doc__, self.function.__module__
        call.__annotations__ = {item.name: item.annotation for item in parameters}
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call


def with_settings(
    chosen: Mapping[str, str | Flag | None] | None = None, others: bool | None = None, without: Sequence[str] = ()
) -> Callable[[Function], WithSettings]:
    """Give a command the options of the `chosen` settings; its parameter `given` takes {"key.path": value}.

    `chosen`: key -> another help text, another flag, or None for the flag of the schema. `others`: also every other
    setting that has a flag, but for keys that begin with one of `without`; default: if none is chosen.
    """
    others = chosen is None if others is None else others
    return lambda function: WithSettings(function, chosen or {}, others, tuple(without))


def _with_flag(setting: Setting, flag: str | Flag | None) -> Setting:
    if isinstance(flag, str):
        assert setting.flag is not None, setting.key
        flag = replace(setting.flag, help=flag)
    return setting if flag is None else replace(setting, flag=flag)


def _parameter(setting: Setting) -> inspect.Parameter:
    """The parameter from which typer makes the option of a setting; its value is None if it is not given."""
    flag = setting.flag
    assert flag is not None
    complete = None if flag.completion is None else COMPLETION[flag.completion]
    type_: Any = _type(setting.field.annotation, flag.repeated)
    metavar = flag.metavar or METAVARS.get(type_, "VALUE")
    info = option(flag.panel, flag.name, help=_help(flag, setting.default), metavar=metavar, complete=complete)
    annotation: Any = Annotated[type_ | None, info] if flag.common else Annotated[type_ | None, info, RARE]
    return inspect.Parameter(flag.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(flag: Flag, default: Any) -> str:
    text = flag.help
    if "{names}" in text:
        text = text.replace("{names}", ", ".join(logger_names() if flag.completion == "logger" else source_names()))
    if isinstance(default, bool) or default in (None, ()) or "default:" in text:
        return text
    shown = f"{default:g}" if isinstance(default, float) else default
    return f"{text.rstrip('.')} (default: {shown})."


def _type(annotation: Any, repeated: bool) -> Any:
    """The type of an option's value: what the command line converts itself; the schema does the rest."""
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0], repeated)
    if get_origin(annotation) in (Union, UnionType):
        return _type(next(part for part in get_args(annotation) if part is not type(None)), repeated)
    if repeated:
        items = get_args(annotation)
        if items[1:] != (Ellipsis,):  # one value for each teacher, which the schema converts
            return list[Path] if annotation is Path else list[str]
        return list[_type(items[0], False)]  # type: ignore[misc]
    return annotation if annotation in (bool, int, float, Path) else str


METAVARS: Mapping[Any, str] = {bool: "", int: "N", list[int]: "N", float: "X", Path: "PATH"}
"""What the value of an option is, if its flag does not say so."""


def _panel(parameter: inspect.Parameter) -> int:
    """Place of the panel in the help; arguments and the context come first."""
    for item in getattr(parameter.annotation, "__metadata__", ()):
        if (panel := getattr(item, "rich_help_panel", None)) is not None:
            return PANELS.index(panel)
    return -1


def rare_names(function: Function) -> frozenset[str]:
    """Parameters of a command that are marked as rare."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return frozenset(item.name for item in parameters if RARE in getattr(item.annotation, "__metadata__", ()))


@dataclass(frozen=True)
class DistillOptions:
    """Options of `distill` that another command was given."""

    values: Mapping[str, Any]
    """By their names in Python."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def given(self) -> dict[str, Any]:
        """{"key.path": value} of the settings among them."""
        from irgdistill.config import options, values_of

        return values_of({name: self.values[name] for name in options()})

    @property
    def settings(self) -> list[str]:
        """Values of --set."""
        return list(self.values["settings"] or ())

    def config(self) -> Config:
        from irgdistill.config import load_config

        return load_config(self.values["preset"], self.settings, self.given)


def options_of_distill(context: typer.Context) -> DistillOptions:
    """Parse what a command was given besides its own options as `distill` parses it.

    Raises UserError for an option that the command refuses.
    """
    assert context.parent is not None
    name, refused = next((item.name, item.refused or ()) for item in COMMANDS if item.name == context.info_name)
    parser = context.parent.command.get_command(context.parent, "distill")  # type: ignore[attr-defined]
    try:
        values: dict[str, Any] = parser.make_context(name, list(context.args), parent=context.parent).params
    except Exception as caught:
        error: Any = caught
        if not is_unknown_option(error):
            raise
        own = [
            option for parameter in (*context.command.get_params(context), *parser.params) for option in parameter.opts
        ]
        known = [option for option in own if option.strip("-").replace("-", "_") not in refused]
        raise UserError(f"no option {error.option_name}{nearest(error.option_name, known)}") from None
    for option in refused:
        if values[option]:
            raise UserError(f"{name} does not take --{option.replace('_', '-')}")
    return DistillOptions(values)


def is_unknown_option(error: Any) -> bool:
    """Whether a parser's error is click's NoSuchOption, which has no public place in typer."""
    return hasattr(error, "possibilities") and hasattr(error, "option_name")
