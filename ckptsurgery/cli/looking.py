"""Commands that only look: `inspect`, `diff`, `ties`."""

from __future__ import annotations

from typing import Annotated

import typer

import ckptsurgery as cs

from . import options as o
from .output import show, width

__all__ = ["diff", "inspect", "ties"]


def inspect(
    source: o.Source,
    filter: o.Filter = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show modules as a tree with totals.")] = False,
    all_keys: Annotated[bool, typer.Option("--all", help="Give each key a line instead of folding runs.")] = False,
    subtree: o.Subtree = None,
    by_file: o.ByFile = False,
    json: o.Json = False,
) -> None:
    """Show what is in a checkpoint.

    Only headers are read.

    \b
    ckptsurgery inspect model.safetensors
    ckptsurgery inspect run/epoch_3.pt --subtree model.ema --tree
    ckptsurgery inspect hf://org/repo --filter 'layers.{i}.attn.{rest...}' --json
    """
    from ..reporting.inspecting import inspection

    with cs.open(source, subtree=subtree, by_file=by_file) as checkpoint:
        found = inspection(checkpoint, filter)
    show(found if json else found.render(width(), fold=not all_keys, as_tree=tree), json)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    json: o.Json = False,
) -> None:
    """Compare two checkpoints.

    Keys, shapes, dtypes and values.

    \b
    ckptsurgery diff before.safetensors after.safetensors
    """
    with cs.open(a) as first, cs.open(b) as second:
        show(cs.diff(first, second), json)


def ties(source: o.Source, subtree: o.Subtree = None, json: o.Json = False) -> None:
    """List the names that share one tensor.

    \b
    ckptsurgery ties model.safetensors
    """
    with cs.open(source, subtree=subtree) as checkpoint:
        groups = cs.ties(checkpoint)
    if json:
        show([{"names": list(group.names), "kind": group.kind} for group in groups], as_json=True)
    else:
        show("\n".join(f"{' = '.join(group.names)}  ({group.kind})" for group in groups) or "no tied tensors")
