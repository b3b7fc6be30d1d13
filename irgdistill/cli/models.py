"""`irgdistill models`"""

from __future__ import annotations

from typing import Annotated

import typer

from irgdistill.cli.completion import remember_names
from irgdistill.cli.options import command, option
from irgdistill.config import RESULT


@command("models", order=100, examples=["irgdistill models 'cifar_resnet*'"])
def models(
    pattern: Annotated[
        str, typer.Argument(metavar="FILTER", help="Such as resnet or mobilenet*_100.", show_default=False)
    ] = "*",
    as_json: Annotated[bool, option(RESULT, "--json", help="Print one JSON object per line.")] = False,
) -> None:
    """List networks with parameters, multiply-adds, input size and the resolutions of their stages."""
    from irgdistill.commands.models import list_models

    remember_names()
    list_models(pattern, as_json)
