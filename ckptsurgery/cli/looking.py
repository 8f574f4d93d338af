"""Commands that only look: `inspect`, `diff`, `ties`, `doctor`, `explain`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

import ckptsurgery as cs

from . import parameters as o
from .output import save_page, show, width
from .recipe_from_options import recipe_from
from .remedies import shell_text
from .sources import SourceOptions, open_source, open_two

__all__ = ["diff", "doctor", "explain", "inspect", "ties"]


class Align(StrEnum):
    """The evidence that a recipe is inferred from."""

    names = "names"
    values = "values"


def inspect(
    source: o.MaybeSource = None,
    filter: o.Filter = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show modules as a tree with totals.")] = False,
    depth: Annotated[
        int | None, typer.Option("--depth", metavar="N", min=1, help="Show N levels of the tree; implies --tree.")
    ] = None,
    all_keys: Annotated[bool, typer.Option("--all", help="Give each key a line instead of folding runs.")] = False,
    subtree: o.Subtree = None,
    by_file: o.ByFile = False,
    html: o.Html = None,
    component: o.Component = None,
    file: o.File = None,
    mount: o.Mount = None,
    download: o.Download = False,
    json: o.Json = False,
) -> None:
    """Show what is in a checkpoint.

    Only headers are read.

    \b
    ckptsurgery inspect model.safetensors
    ckptsurgery inspect model.safetensors --depth 2 --html model.html
    ckptsurgery inspect run/epoch_3.pt --subtree model.ema --tree
    ckptsurgery inspect hf://org/repo --filter 'layers.{i}.attn.{rest...}' --json
    ckptsurgery inspect pipeline/ --component vae
    ckptsurgery inspect --mount vision.=tower/ --mount llm.=model/
    """
    from ..reporting.inspecting import inspection

    with open_source(source, mount, subtree, by_file, component, file, download) as checkpoint:
        found = inspection(checkpoint, filter)
    if html:
        save_page(found, html, checkpoint.source)
    show(found if json else found.render(width(), fold=not all_keys, as_tree=tree, depth=depth), json)


def diff(
    a: o.MaybeFirst = None,
    b: o.MaybeSecond = None,
    recipe: o.RecipeNames = None,
    rule: o.Rules = None,
    rest: o.Rest = None,
    align: Annotated[
        Align | None, typer.Option(help="Infer the recipe from A to B, from names and shapes or from values.")
    ] = None,
    headers: Annotated[bool, typer.Option("--headers", help="Compare names, shapes and dtypes, no values.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 where they differ.")] = False,
    html: o.Html = None,
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
    """Compare two checkpoints.

    Keys, shapes, dtypes, ties and values; with a recipe, given or inferred, what it makes of A is compared with B.

    \b
    ckptsurgery diff before.safetensors after.safetensors --html diff.html
    ckptsurgery diff old.bin new.safetensors --recipe mine.toml --exit-code
    ckptsurgery diff ours.safetensors theirs.safetensors --align names
    ckptsurgery diff pipeline/ tuned.safetensors --component vae
    """
    said = recipe_from(recipe, rule, rest=rest) if recipe or rule or rest else None
    given = SourceOptions(mount, subtree, by_file, component, file, download)
    other = SourceOptions(mount_other, subtree_other, component=component_other, file=file_other)
    with open_two(a, b, given, other) as (first, second):
        found = cs.diff(first, second, said, align=align, values=not headers)
        title = f"{first.source} and {second.source}"
    if html:
        save_page(found, html, title)
    show(found, json, wrap=True)
    if exit_code and not found.identical:
        raise typer.Exit(1)


def ties(
    source: o.MaybeSource = None,
    subtree: o.Subtree = None,
    by_file: o.ByFile = False,
    component: o.Component = None,
    file: o.File = None,
    mount: o.Mount = None,
    download: o.Download = False,
    json: o.Json = False,
) -> None:
    """List the names that share one tensor.

    \b
    ckptsurgery ties model.safetensors
    ckptsurgery ties pipeline/ --component text_encoder
    """
    with open_source(source, mount, subtree, by_file, component, file, download) as checkpoint:
        groups = cs.ties(checkpoint)
    if json:
        show([{"names": list(group.names), "kind": group.kind} for group in groups], as_json=True)
    else:
        show("\n".join(f"{' = '.join(group.names)}  ({group.kind})" for group in groups) or "no tied tensors")


def doctor(
    source: o.MaybeSource = None,
    subtree: o.Subtree = None,
    by_file: o.ByFile = False,
    component: o.Component = None,
    file: o.File = None,
    mount: o.Mount = None,
    download: o.Download = False,
    headers: Annotated[bool, typer.Option("--headers", help="Check files and headers only.")] = False,
    json: o.Json = False,
) -> None:
    """Check a checkpoint for problems.

    An index against its shards, NaN and Inf, dead tensors, lost ties, a padded vocabulary, unsafe pickles. Exit code 1
    where there is an error among the findings.

    \b
    ckptsurgery doctor model/
    ckptsurgery doctor run/epoch_3.pt --subtree model.ema --json
    ckptsurgery doctor pipeline/ --component vae
    """
    if source is not None and not (by_file or component or file or mount or download):
        found = cs.doctor(source, subtree, values=not headers)  # looks at the files of a source that does not open, too
    else:
        with open_source(source, mount, subtree, by_file, component, file, download) as checkpoint:
            found = cs.doctor(checkpoint, values=not headers)
    show(found if json else found.text(lambda finding: shell_text(finding, ["--subtree"])), json)
    if not found.healthy:
        raise typer.Exit(1)


def explain(
    code: Annotated[str, typer.Argument(metavar="CODE", help="The code of an error, such as 'missing-keys'.")],
    json: o.Json = False,
) -> None:
    """Explain an error: its meaning, an example, the remedy.

    \b
    ckptsurgery explain missing-keys
    """
    from ..explanations import explanation

    text = explanation(code)
    show({"code": code, "text": text} if json else text, json, wrap=True)
