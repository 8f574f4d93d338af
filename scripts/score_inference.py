"""Prints how well recipes are inferred on a corpus of real conversions: a line a pair, then totals, then each family left out.

    python scripts/score_inference.py CORPUS [--only TEXT] [--wrong]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ckptsurgery as cs
from ckptsurgery.inference.suggesting import suggest


@dataclass
class Score:
    """What one pair gave."""

    name: str
    right: int
    wrong: list[str]
    open: list[str]
    seconds: float
    lines: int
    assumed: int
    error: str = ""

    @property
    def whole(self) -> bool:
        return not self.wrong and not self.open and not self.error


def specs(side: dict[str, Any]) -> dict[str, cs.TensorSpec]:
    return {k: cs.TensorSpec(tuple(v["shape"]), v["dtype"]) for k, v in side.items()}


def numbered(side: dict[str, Any]) -> dict[str, torch.Tensor]:
    result, at = {}, 0
    for key, spec in side.items():
        size = 1
        for n in spec["shape"]:
            size *= n
        result[key] = torch.arange(at, at + size).reshape(spec["shape"])
        at += size
    return result


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def score(path: Path) -> Score:
    pair = json.loads(path.read_text())
    source, target = specs(pair["source"]), specs(pair["target"])
    start = time.perf_counter()
    found = suggest(source, target)
    seconds = time.perf_counter() - start
    result = Score(path.stem, 0, [], [], seconds, len(found.recipe.rules), len(found.assumptions))
    try:
        text = str(found.recipe)
        again = cs.Recipe.loads(text) if hasattr(cs.Recipe, "loads") else found.recipe
        made = cs.plan(numbered(pair["source"]), again).state_dict()
    except cs.CkptSurgeryError as error:
        made, result.error = {}, str(error).splitlines()[0]
    for key, wanted in pair["expected"].items():
        if key not in made:
            result.open.append(key)
        elif wanted == 0 or digest(made[key]) == wanted:
            result.right += 1
        else:
            result.wrong.append(key)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--wrong", action="store_true")
    options = parser.parse_args()
    scores = []
    print(f"{'pair':46}{'right':>6}{'wrong':>6}{'open':>6}{'rules':>6}{'assumed':>8}{'s':>7}  whole")
    for path in sorted(options.corpus.glob("*.json")):
        if options.only not in path.stem:
            continue
        one = score(path)
        scores.append(one)
        print(
            f"{one.name:46}{one.right:6}{len(one.wrong):6}{len(one.open):6}{one.lines:6}{one.assumed:8}{one.seconds:7.2f}"
            f"  {'yes' if one.whole else 'NO'} {one.error}"
        )
        if options.wrong:
            for key in one.wrong:
                print("    wrong", key)
            for key in one.open[:8]:
                print("    open ", key)
    right, wrong, unknown = sum(s.right for s in scores), sum(len(s.wrong) for s in scores), sum(len(s.open) for s in scores)
    total = right + wrong + unknown
    print(
        f"{len(scores)} pairs, {total} tensors: right {right / total:.2%}, wrong {wrong / total:.2%}, open {unknown / total:.2%};"
        f" whole {sum(s.whole for s in scores)}; slowest {max(s.seconds for s in scores):.2f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
