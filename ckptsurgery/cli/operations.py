"""`ops`: the value ops, listed and shown."""

from __future__ import annotations

from typing import Annotated

import typer

from . import parameters as o
from .output import show, show_listing
from .words import Command, CommandGroup

__all__ = ["app"]

app = typer.Typer(cls=CommandGroup, invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def ops(context: typer.Context, json: o.Json = False) -> None:
    """List the ops that rules may use, and show one.

    \b
    ckptsurgery ops list merge
    ckptsurgery ops show slerp
    """
    if context.invoked_subcommand is None:
        _list("", json)


@app.command("list", cls=Command)
def list_(
    text: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only ops with this text in name or summary.")] = "",
    json: o.Json = False,
) -> None:
    """List the ops that rules may use.

    \b
    ckptsurgery ops list
    ckptsurgery ops list dequant
    """
    _list(text, json)


def _list(text: str, json: bool) -> None:
    from ..ops.reference import reference

    show_listing({op.name: op.summary for op in reference()}, text, "op", json)


@app.command("show", cls=Command)
def show_op(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of an op, such as 'slerp'.")],
    json: o.Json = False,
) -> None:
    """Show an op: formula, arguments, exactness, inverse, an example.

    \b
    ckptsurgery ops show slerp
    """
    from ..errors import CkptSurgeryError, Diagnostic
    from ..ops.base import OpError
    from ..ops.reference import describe

    try:
        found = describe(name)
    except OpError as error:
        raise CkptSurgeryError(Diagnostic("bad-op", str(error), remedies=error.remedies("name"))) from None
    show(found.to_json() if json else str(found), json)
