#!/usr/bin/env python
"""Give a trained body a new head: load the body, initialise the head anew by seed, freeze what is not to be trained.

    scripts/reinit_head.py                                                  # the built-in demo
    scripts/reinit_head.py last.pt mymodels:build --head classifier
    scripts/reinit_head.py last.pt mymodels:build --head fc --init "trunc_normal(std=0.02)" --freeze --out start.pt

MODEL is `module:callable`; the callable takes no argument and returns an nn.Module with the new head. Each --head names
a module of it (or a key pattern); what the source holds for it is set aside, whatever its shape. Every initialiser is
seeded by key, so the same seed gives the same head whatever else is loaded.
"""

from __future__ import annotations

import argparse
import importlib
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


def demo(folder: Path) -> tuple[Path, nn.Module, list[str]]:
    """A network for six classes in a training checkpoint, the same for four, and the name of its head."""
    import torch

    from ckptsurgery.demo.models import Pretrained

    state = {f"module.{key}": tensor for key, tensor in Pretrained(6).state_dict().items()}
    torch.save({"step": 100, "model": state}, folder / "six_classes.pt")
    return folder / "six_classes.pt", Pretrained(4), ["head"]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="a file, a folder, or hf://org/repo")
    add("model", nargs="?", metavar="MODEL", help="module:callable")
    add("--head", action="append", default=[], metavar="PATH", help="the module to initialise anew; repeatable")
    add("--init", default="default", metavar="NAME", help="an initialiser; by default what the model itself would do")
    add("--recipe", metavar="R", help="a TOML file, the name of a built-in recipe, or one rule")
    add("--freeze", action="store_true", help="freeze everything but the head")
    add("--seed", type=int, default=0, help="of the initialiser")
    add("--out", metavar="FILE", help="save the model here")
    given = parser.parse_args()
    if given.source and not (given.model and given.head):
        parser.error("a source needs a model (module:callable) and at least one --head")
    return given


def main() -> None:
    """Load, initialise, freeze, report, save."""
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        if given.source:
            source, model, heads = given.source, build(given.model), given.head
        else:
            source, model, heads = demo(Path(folder))
        report = cs.load_into(model, source, given.recipe, init=dict.fromkeys(heads, given.init), seed=given.seed)
    print(report)
    head = cs.select(model, *heads)
    if given.freeze:
        (~head).freeze()
    print("\nthe new head:")
    print(head.stats())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\ntrainable: {trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters")
    if given.out:
        print(f"saved to {cs.save(model, given.out).files[0]}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except cs.CkptSurgeryError as error:
        sys.exit(str(error))
