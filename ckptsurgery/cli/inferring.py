"""`suggest`: a recipe that nobody had to write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import ckptsurgery as cs

from . import options as o
from .output import show

__all__ = ["suggest"]


def suggest(
    source: o.Source,
    target: Annotated[str, typer.Argument(metavar="TGT", help="A checkpoint in the layout that is wanted.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the recipe there, as TOML.")
    ] = None,
    values: Annotated[
        bool, typer.Option("--values", help="Both hold the same weights: read the recipe off the data, and prove it.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Infer the recipe from one layout to another.

    From names and shapes alone, or from values; what cannot be decided is listed, and left out.

    \b
    ckptsurgery suggest ours.safetensors theirs.safetensors -o recipe.toml
    ckptsurgery suggest ours.safetensors theirs.safetensors --values
    """
    found = cs.suggest(source, target, by="values" if values else "names")
    if output is not None:
        output.write_text(found.recipe.dumps())
    show(found, json)
