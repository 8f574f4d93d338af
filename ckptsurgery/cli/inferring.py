"""Commands that infer and prove: `suggest`, `verify` and `check-loaded`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import ckptsurgery as cs

from . import parameters as o
from .output import show
from .recipe_from_options import config_from, dims_from, recipe_from
from .sources import SourceOptions, open_source, open_two
from .targets import built, loaded

__all__ = ["check_loaded", "suggest", "verify"]


def suggest(
    source: o.MaybeSource = None,
    target: Annotated[
        str | None,
        typer.Argument(metavar="[TGT]", show_default=False, help="A checkpoint in the layout that is wanted."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the recipe there, as TOML.")
    ] = None,
    values: Annotated[
        bool, typer.Option("--values", help="Both hold the same weights: read the recipe off the data, and prove it.")
    ] = False,
    subtree: o.Subtree = None,
    by_file: o.ByFile = False,
    component: o.Component = None,
    file: o.File = None,
    mount: o.Mount = None,
    download: o.Download = False,
    subtree_other: o.SubtreeOther = None,
    component_other: o.ComponentOther = None,
    file_other: o.FileOther = None,
    mount_other: o.MountOther = None,
    json: o.Json = False,
) -> None:
    """Infer the recipe from one layout to another.

    Uses names and shapes, or values. Undecided tensors are listed and left out.

    \b
    ckptsurgery suggest ours.safetensors theirs.safetensors -o recipe.toml
    ckptsurgery suggest ours.safetensors theirs.safetensors --values
    ckptsurgery suggest ours.safetensors pipeline/ --component-other vae
    """
    given = SourceOptions(mount, subtree, by_file, component, file, download)
    other = SourceOptions(mount_other, subtree_other, component=component_other, file=file_other)
    with open_two(source, target, given, other) as (ours, theirs):
        found = cs.suggest(ours, theirs, by="values" if values else "names")
    if output is not None:
        output.write_text(found.recipe.dumps())
    show(found, json)


def verify(
    model: Annotated[str, typer.Option(metavar="MODULE:CALLABLE", help="The callable that builds the model for A.")],
    inputs: Annotated[
        str, typer.Option(metavar="FILE", help="Tensors to call with: by name, or by position ('0', '1').")
    ],
    a: o.MaybeFirst = None,
    b: o.MaybeSecond = None,
    other: Annotated[
        str | None,
        typer.Option(metavar="MODULE:CALLABLE", help="The callable that builds the model for B, if another."),
    ] = None,
    recipe: o.RecipeNames = None,
    rule: o.Rules = None,
    rest: o.Rest = None,
    tolerance: Annotated[float | None, typer.Option(help="How far apart, as a share of the largest output.")] = None,
    subtree: o.Subtree = None,
    by_file: o.ByFile = False,
    component: o.Component = None,
    file: o.File = None,
    mount: o.Mount = None,
    download: o.Download = False,
    subtree_other: o.SubtreeOther = None,
    component_other: o.ComponentOther = None,
    file_other: o.FileOther = None,
    mount_other: o.MountOther = None,
    json: o.Json = False,
) -> None:
    """Compare what two checkpoints compute.

    Outputs on the same inputs and, where they differ, the first module at which they part. A recipe brings B into the
    layout of the model that it is loaded into.

    \b
    ckptsurgery verify a.pt b.safetensors --model mine:Net --inputs batch.pt
    ckptsurgery verify a.pt b.pt --model mine:Net --other theirs:Net --inputs x.pt
    ckptsurgery verify a.pt b.pt --model mine:Net --inputs x.pt -r back.toml
    """
    first = built(model, "--model")
    second = built(other, "--other") if other else built(model, "--model")
    said = recipe_from(recipe, rule, rest=rest) if recipe or rule or rest else None
    with cs.open(inputs) as batch:
        tensors = {name: tensor.load() for name, tensor in batch.items()}
    positional = all(name.isdigit() for name in tensors)
    called_with = tuple(tensors[k] for k in sorted(tensors, key=int)) if positional else tensors
    given = SourceOptions(mount, subtree, by_file, component, file, download)
    other_given = SourceOptions(mount_other, subtree_other, component=component_other, file=file_other)
    with open_two(a, b, given, other_given) as (ours, theirs):
        # A skeleton has no memory to copy to, and a model that has some need not keep it.
        cs.load_into(first, ours, assign=True)
        cs.load_into(second, theirs, said, assign=True)
        plan = None if said is None else cs.plan(theirs, said, target=second)
        found = cs.verify(first, second, called_with, tolerance=tolerance, plan=plan)
    show(found, json, wrap=True)
    if not found.ok:
        raise typer.Exit(1)


def check_loaded(
    model: Annotated[str, typer.Option(metavar="MODULE:CALLABLE", help="What builds the model and loads it.")],
    source: o.MaybeSource = None,
    recipe: o.RecipeNames = None,
    rule: o.Rules = None,
    rest: o.Rest = None,
    config: o.Config = None,
    dim: o.Dim = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="A module or key of the model that SRC was not to fill. Repeatable."),
    ] = None,
    untied: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name of a tensor that is meant to be apart in the model. Repeatable."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="lossless|error|model", help="Which casts are accepted.")] = "lossless",
    subtree: o.Subtree = None,
    by_file: o.ByFile = False,
    component: o.Component = None,
    file: o.File = None,
    mount: o.Mount = None,
    download: o.Download = False,
    json: o.Json = False,
) -> None:
    """Prove that a model holds a checkpoint.

    The model may be loaded by any code. Every parameter and buffer is compared, and each wrong one is listed with what
    it holds instead.

    \b
    ckptsurgery check-loaded model.safetensors --model mine:load
    ckptsurgery check-loaded model.safetensors --model mine:load --keep head
    """
    said = recipe_from(recipe, rule, rest=rest) if recipe or rule or rest else None
    with open_source(source, mount, subtree, by_file, component, file, download) as checkpoint:
        report = cs.check_loaded(
            loaded(model),
            checkpoint,
            said,
            keep=keep or (),
            untied=untied or (),
            dtype=dtype,
            config=config_from(config),
            dims=dims_from(dim) or None,
        )
    show(report, json, wrap=True)
