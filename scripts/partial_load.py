#!/usr/bin/env python
"""Load what fits of a checkpoint into a model, and account for every tensor of both.

    scripts/partial_load.py                                       # the built-in demo
    scripts/partial_load.py last.pt mymodels:build                # every difference is an error, with its remedy
    scripts/partial_load.py last.pt mymodels:build --partial      # load what fits, list what did not
    scripts/partial_load.py last.pt mymodels:build --init head --drop fc --out start.safetensors

MODEL is `module:callable`; the callable takes no argument and returns an nn.Module. Modules in the working directory
are found. Exit code 0 when the model is loaded, 1 when something stands against it, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import ckptsurgery as cs

if TYPE_CHECKING:
    from torch import nn


def build(place: str) -> nn.Module:
    """The model that `module:callable` builds."""
    from torch import nn

    sys.path.insert(0, "")
    module, _, name = place.partition(":")
    model = getattr(importlib.import_module(module), name)()
    if not isinstance(model, nn.Module):
        raise SystemExit(f"{place} gives a {type(model).__name__}, no nn.Module")
    return model


def demo(folder: Path) -> tuple[Path, nn.Module, cs.Recipe]:
    """A checkpoint in somebody else's layout, a model of our own, and the recipe between them."""
    from ckptsurgery.demo.models import Pretrained, Student
    from ckptsurgery.demo.story import RECIPE

    state = {f"module.{key}": tensor for key, tensor in Pretrained(6).state_dict().items()}
    cs.save(state, folder / "theirs.safetensors")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder / "theirs.safetensors", Student(4), cs.load_recipe(folder / "recipe.toml")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="a file, a folder, or hf://org/repo")
    add("model", nargs="?", metavar="MODEL", help="module:callable")
    add("--recipe", metavar="R", help="a TOML file, the name of a built-in recipe, or one rule")
    add("--init", action="append", default=[], metavar="PATH", help="initialise this module anew; repeatable")
    add("--keep", action="append", default=[], metavar="PATH", help="leave this module as constructed; repeatable")
    add("--drop", action="append", default=[], metavar="PATH", help="leave this part of the source out; repeatable")
    add("--mismatch", choices=("error", "init", "keep"), default="error", help="what becomes of other shapes")
    add("--dtype", choices=("lossless", "error", "model"), default="lossless", help="what becomes of other dtypes")
    add("--partial", action="store_true", help="load what fits, and list what did not")
    add("--subtree", metavar="PATH", help="where the tensors lie in a training checkpoint")
    add("--check-values", action="store_true", help="look for NaN and Inf before anything is written")
    add("--seed", type=int, default=0, help="of the initialisers")
    add("--out", metavar="FILE", help="save the loaded model here")
    add("--json", action="store_true", help="print the report as JSON")
    given = parser.parse_args()
    if given.source and not given.model:
        parser.error("a source needs a model: module:callable")
    return given


def main() -> None:
    """Load, report, save."""
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        if given.source:
            source, model, recipe = given.source, build(given.model), given.recipe
        else:
            source, model, recipe = demo(Path(folder))
        report = cs.load_into(
            model,
            source,
            recipe,
            init=given.init,
            keep=given.keep,
            drop=given.drop,
            mismatch=given.mismatch,
            dtype=given.dtype,
            partial=given.partial,
            subtree=given.subtree,
            check_values=given.check_values,
            seed=given.seed,
        )
    print(json.dumps(report.to_json(), indent=2) if given.json else report)
    if given.out:
        print(f"saved to {cs.save(model, given.out).files[0]}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except cs.CkptSurgeryError as error:
        sys.exit(str(error))
