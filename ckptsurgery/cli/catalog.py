"""`recipes`: the built-in ones, listed, shown, matched; those of other frameworks, imported and exported."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import ckptsurgery as cs

from . import options as o
from .output import show, width
from .words import Command, CommandGroup

__all__ = ["app"]

app = typer.Typer(cls=CommandGroup, invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def recipes(context: typer.Context, json: o.Json = False) -> None:
    """List, show and match the built-in recipes.

    \b
    ckptsurgery recipes
    ckptsurgery recipes show NAME
    ckptsurgery recipes match model.safetensors
    ckptsurgery recipes import transformers:TYPE -o mine.toml
    """
    from ..reporting.tables import listing

    if context.invoked_subcommand is None:
        found = {name: cs.load_recipe(name).summary for name in cs.list_recipes()}
        show(found if json else "\n".join(listing(found, width() if sys.stdout.isatty() else None)), json)


@app.command("show", cls=Command)
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A built-in recipe, or a TOML file.")],
    inverse: o.Inverse = False,
    json: o.Json = False,
) -> None:
    """Print a recipe as TOML.

    \b
    ckptsurgery recipes show mine.toml --inverse
    """
    recipe = cs.load_recipe(name)
    text = (recipe.inverse() if inverse else recipe).dumps().rstrip()
    show({"name": name, "summary": recipe.summary, "toml": text} if json else text, json)


@app.command("match", cls=Command)
def match(source: o.Source, subtree: o.Subtree = None, config: o.Config = None, json: o.Json = False) -> None:
    """Name the recipes that fit a checkpoint.

    Only headers are read.

    \b
    ckptsurgery recipes match model.safetensors
    """
    from .recipe import config_from

    with cs.open(source, subtree=subtree) as checkpoint:
        found = cs.match_recipes(checkpoint, config=config_from(config))
    show(list(found) if json else "\n".join(found) or "no built-in recipe fits", json)


@app.command("import", cls=Command)
def import_(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="transformers:TYPE, module:function, or merge.yml.")],
    specs: Annotated[
        str | None, typer.Option(metavar="SRC", help="A small checkpoint of the layout that the function takes.")
    ] = None,
    output: o.Output = None,
    json: o.Json = False,
) -> None:
    """Turn another framework's mapping into a recipe.

    \b
    ckptsurgery recipes import transformers:TYPE -o type.toml
    ckptsurgery recipes import mypackage.convert:to_ours --specs tiny.safetensors
    ckptsurgery recipes import merge.yml -o merge.toml
    """
    recipe = cs.recipes.import_mapping(what, specs)
    if output is not None:
        output.write_text(recipe.dumps())
    show({"mapping": what, "toml": recipe.dumps()} if json else recipe.dumps().rstrip(), json)
