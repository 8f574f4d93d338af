"""Prints how well recipes are inferred on pairs of networks that nothing was tuned on, or on the half that was.

    python scripts/score_pairs.py tests/inference/pairs/tuning.json.gz [--only TEXT] [--wrong] [--seed N]

`scripts/pairs/build.py` makes the files. A tensor that has no counterpart and is made nonetheless counts as wrong.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

import ckptsurgery as cs
from ckptsurgery.language.toml import loads


@dataclass
class Score:
    """What one pair gave, in target keys."""

    name: str
    kind: str
    known: int
    right: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    spurious: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    seconds: float = 0.0
    rules: int = 0
    fails: str = ""

    @property
    def unnamed(self) -> list[str]:
        """Wrong and spurious tensors that no assumption names."""
        return [k for k in (*self.wrong, *self.spurious) if k not in self.named]

    @property
    def whole(self) -> bool:
        """Whether every tensor with a counterpart is right, and no other was made."""
        return not (self.wrong or self.spurious or self.open)


def specs(listed: Sequence[tuple[str, Sequence[int]]]) -> dict[str, cs.TensorSpec]:
    """A side's headers."""
    return {k: cs.TensorSpec(tuple(s), "F32") for k, s in listed}


def numbered(listed: Sequence[tuple[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """A side's tensors, their elements numbered through."""
    result, at = {}, 0
    for key, shape in listed:
        result[key] = torch.arange(at, at + prod(shape)).reshape(tuple(shape))
        at += prod(shape)
    return result


def digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's numbers, in C order."""
    return hashlib.blake2b(tensor.contiguous().numpy().astype("<i8").tobytes(), digest_size=6).hexdigest()


def score(pair: Mapping[str, Any], seed: int | None = None) -> Score:
    """Infer a recipe, read it back from its text, run it, and compare what it makes with the truth."""
    source, target = specs(pair["source"]), specs(pair["target"])
    if seed is not None:
        source, target = (dict(random.Random(seed).sample(list(s.items()), len(s))) for s in (source, target))
    start = time.process_time()
    found = cs.suggest(source, target)
    result = Score(pair["name"], pair["kind"], len(pair["expected"]))
    result.seconds, result.rules = time.process_time() - start, len(found.recipe.rules)
    result.named = {k for a in found.assumptions for k in a.keys}
    try:
        made = cs.plan(numbered(pair["source"]), loads(found.recipe.dumps())).state_dict()
    except cs.CkptSurgeryError as error:
        made, result.fails = {}, error.diagnostics[0].headline
    for key in target:
        wanted = pair["expected"].get(key)
        if key not in made:
            result.open += [key] if wanted else []
        elif wanted is None:
            result.spurious.append(key)
        else:
            (result.right if digest(made[key]) == wanted else result.wrong).append(key)
    return result


def totals(label: str, scores: Sequence[Score]) -> str:
    """One line for many pairs."""
    known = max(1, sum(s.known for s in scores))
    right, wrong, spurious, left = (
        sum(len(getattr(s, n)) for s in scores) for n in ("right", "wrong", "spurious", "open")
    )
    return (
        f"{label:10}{len(scores):3} pairs {known:5} tensors: right {right / known:6.1%}, wrong {wrong / known:5.1%},"
        f" spurious {spurious} ({sum(len(s.unnamed) for s in scores)} unnamed), open {left / known:5.1%};"
        f" whole {sum(s.whole for s in scores):2}; slowest {max(s.seconds for s in scores):.2f} s"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--only", default="", help="pairs whose names contain this")
    parser.add_argument("--wrong", action="store_true", help="list what is wrong or open")
    parser.add_argument("--seed", type=int, default=None, help="shuffle both sides first")
    options = parser.parse_args()
    listed = json.loads(gzip.decompress(options.pairs.read_bytes()))
    scores = []
    print(f"{'pair':40}{'right':>6}{'wrong':>6}{'spur.':>6}{'open':>6}{'unn.':>6}{'rules':>6}{'s':>7}  whole")
    for pair in listed:
        if options.only not in pair["name"]:
            continue
        one = score(pair, options.seed)
        scores.append(one)
        counts = "".join(f"{len(c):6}" for c in (one.right, one.wrong, one.spurious, one.open, one.unnamed))
        print(f"{one.name:40}{counts}{one.rules:6}{one.seconds:7.2f}  {'yes' if one.whole else 'no'}")
        if one.fails:
            print(f"    does not plan: {one.fails}")
        for label in ("wrong", "spurious", "open") if options.wrong else ():
            for key in getattr(one, label):
                print(f"    {label:9}{key}{'' if label == 'open' or key in one.named else '  UNNAMED'}")
    for kind in dict.fromkeys(s.kind for s in scores):
        print(totals(kind, [s for s in scores if s.kind == kind]))
    print(totals("all", scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
