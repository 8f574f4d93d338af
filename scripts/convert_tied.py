#!/usr/bin/env python
"""Convert a checkpoint whose tensors are tied, and prove that they still are: in the files, and in a model.

    scripts/convert_tied.py                                                     # the built-in demo
    scripts/convert_tied.py old.bin new.safetensors
    scripts/convert_tied.py old/ new/ --rule 'transformer.{k...} -> {k...}' --max-shard-size 5GB
    scripts/convert_tied.py old.bin new/ --tie lm_head.weight=embed.weight --model mymodels:build

Tied tensors are stored once; their other names go into the metadata. --tie adds a name that the source lacks. With
--model (`module:callable`) the result is loaded into a model without weights, and each of its ties is proved with `is`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ckptsurgery as cs

if TYPE_CHECKING:
    from torch import nn


def factory(place: str) -> Callable[[], nn.Module]:
    """What `module:callable` names."""
    sys.path.insert(0, "")
    module, _, name = place.partition(":")
    found: Callable[[], nn.Module] = getattr(importlib.import_module(module), name)
    return found


def demo(folder: Path) -> tuple[Path, Path, list[str], Callable[[], nn.Module]]:
    """A small language model whose head is its embedding, other names for it, and the model that has them."""
    from ckptsurgery.demo.models import Speller

    cs.save({f"module.{key}": tensor for key, tensor in Speller().state_dict().items()}, folder / "old.pt")
    return folder / "old.pt", folder / "new", ["module.{k...} -> {k...}"], Speller


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="a file, a folder, or hf://org/repo")
    add("destination", nargs="?", metavar="DESTINATION", help="the file or folder to write")
    add("--recipe", metavar="R", help="a TOML file, or the name of a built-in recipe")
    add("--rule", action="append", default=[], metavar="RULE", help="SOURCE -> TARGET; repeatable")
    add("--tie", action="append", default=[], metavar="NAME=OF", help="NAME shares the tensor of OF; repeatable")
    add("--max-shard-size", metavar="SIZE", help="5GB, 5GiB")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--model", metavar="MODEL", help="module:callable")
    given = parser.parse_args()
    if given.source and not given.destination:
        parser.error("a source needs a destination")
    if any("=" not in tie for tie in given.tie):
        parser.error("--tie NAME=OF")
    return given


def recipe_of(name: str | None, rules: list[str], ties: list[str]) -> cs.Recipe:
    """One recipe; what no rule names stays as it is, unless a recipe says otherwise."""
    said = cs.Recipe(rules, tie=dict(tie.split("=", 1) for tie in ties), rest="error" if name else "keep")
    return cs.load_recipe(name) + said if name else said


def show(title: str, groups: object) -> None:
    """Each group of tied names on a line."""
    print(title)
    for group in groups or ():  # type: ignore[attr-defined]
        print(f"  {' = '.join(group.names)}")
    if not groups:
        print("  none")


def prove(destination: Path | str, build: Callable[[], nn.Module]) -> None:
    """Load the result into a model without weights; every tie is one object there."""
    model = cs.skeleton(build)
    cs.load_into(model, destination)
    named = dict(model.named_parameters(remove_duplicate=False))
    for group in cs.ties(model):
        first, *others = (named[name] for name in group.names if name in named)
        assert all(other is first for other in others), group
    show("tied in the model:", cs.ties(model))


def main() -> None:
    """Convert, compare the ties of both sides, load."""
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        if given.source:
            source, destination, rules, build = given.source, given.destination, given.rule, None
            build = factory(given.model) if given.model else None
        else:
            source, destination, rules, build = demo(Path(folder))
        show("tied in the source:", cs.ties(source))
        plan = cs.plan(source, recipe_of(given.recipe, rules, given.tie))
        report = plan.save(destination, given.max_shard_size, given.overwrite, check=True)
        show("tied in what was written:", cs.ties(destination))
        print(report)
        if build is not None:
            prove(destination, build)


if __name__ == "__main__":
    try:
        main()
    except cs.CkptSurgeryError as error:
        sys.exit(str(error))
