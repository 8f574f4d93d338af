"""`ops`: the value ops, listed and shown."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import parameters as o
from .output import show, width
from .words import Command, CommandGroup

__all__ = ["app"]

app = typer.Typer(cls=CommandGroup, invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def ops(context: typer.Context, json: o.Json = False) -> None:
    """List the ops that rules may use, and show one.

    \b
    ckptsurgery ops
    ckptsurgery ops show slerp
    """
    from ..ops.reference import reference
    from ..tables.columns import listing

    if context.invoked_subcommand is None:
        found = {each.name: each.summary for each in reference()}
        show(found if json else "\n".join(listing(found, width() if sys.stdout.isatty() else None)), json)


@app.command("show", cls=Command)
def show_op(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of an op, such as 'slerp'.")],
    json: o.Json = False,
) -> None:
    """Show an op: formula, arguments, exactness, inverse, an example.

    \b
    ckptsurgery ops show slerp
    """
    from ..errors import CkptSurgeryError, Diagnostic, Remedy
    from ..ops.base import OpError
    from ..ops.reference import describe

    try:
        found = describe(name)
    except OpError as error:
        near = (Remedy("name", error.instead, kind="instead"),) if error.instead else ()
        raise CkptSurgeryError(Diagnostic("bad-op", str(error), remedies=near)) from None
    show(found.to_json() if json else str(found), json)
