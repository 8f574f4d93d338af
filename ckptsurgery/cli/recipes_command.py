"""`recipes`: the built-in ones, listed, shown, matched; those of other frameworks, imported and exported."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

import ckptsurgery as cs

from . import parameters as o
from .output import show, show_listing
from .recipe_from_options import config_from, dims_from
from .sources import open_source
from .words import Command, CommandGroup

__all__ = ["app"]

app = typer.Typer(cls=CommandGroup, invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def recipes(context: typer.Context, json: o.Json = False) -> None:
    """List, show and match the built-in recipes.

    \b
    ckptsurgery recipes list litgpt
    ckptsurgery recipes show NAME
    ckptsurgery recipes match model.safetensors
    ckptsurgery recipes import transformers:TYPE -o mine.toml
    ckptsurgery recipes export mine.toml --as vllm
    """
    if context.invoked_subcommand is None:
        _list("", json)


@app.command("list", cls=Command)
def list_(
    text: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only recipes with this text in name or summary.")] = "",
    json: o.Json = False,
) -> None:
    """List the built-in recipes.

    \b
    ckptsurgery recipes list
    ckptsurgery recipes list litgpt
    """
    _list(text, json)


def _list(text: str, json: bool) -> None:
    show_listing({name: cs.load_recipe(name).summary for name in cs.list_recipes()}, text, "built-in recipe", json)


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
def match(
    source: o.MaybeSource = None,
    config: o.Config = None,
    subtree: o.Subtree = None,
    by_file: o.ByFile = False,
    component: o.Component = None,
    file: o.File = None,
    mount: o.Mount = None,
    download: o.Download = False,
    json: o.Json = False,
) -> None:
    """Name the recipes that fit a checkpoint.

    Only headers are read.

    \b
    ckptsurgery recipes match model.safetensors
    """
    with open_source(source, mount, subtree, by_file, component, file, download) as checkpoint:
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


@app.command("schema", cls=Command)
def print_schema(json: o.Json = False) -> None:
    """Print the JSON schema of recipe files.

    \b
    ckptsurgery recipes schema > recipe.schema.json
    """
    from json import dumps

    found = cs.recipes.schema()
    show(found if json else dumps(found, indent=2), json)


class ExportFormat(StrEnum):
    """The forms in which a recipe is exported."""

    python = "python"
    adapter = "adapter"
    vllm = "vllm"
    paddle = "paddle"


@app.command("export", cls=Command)
def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A built-in recipe, or a TOML file.")],
    form: Annotated[
        ExportFormat, typer.Option("--as", help="A function, an adapter class, a vLLM mapper or AOA statements.")
    ] = ExportFormat.python,
    inverse: o.Inverse = False,
    config: o.Config = None,
    dim: o.Dim = None,
    output: o.Output = None,
    json: o.Json = False,
) -> None:
    """Write a recipe in another framework's terms.

    What it cannot say is refused, rule by rule.

    \b
    ckptsurgery recipes export mine.toml -o convert.py
    ckptsurgery recipes export mine.toml --as vllm
    """
    from json import dumps

    recipe = cs.load_recipe(name)
    recipe = recipe.inverse() if inverse else recipe
    if form in (ExportFormat.python, ExportFormat.adapter):
        write = cs.recipes.to_python if form is ExportFormat.python else cs.recipes.to_state_dict_adapter
        text = write(recipe, config=config_from(config), dims=dims_from(dim) or None)
    else:
        text = dumps((cs.recipes.to_vllm if form is ExportFormat.vllm else cs.recipes.to_paddle)(recipe), indent=2)
    if output is not None:
        output.write_text(text)
    show({"name": name, "format": form.value, "text": text} if json else text.rstrip(), json)
