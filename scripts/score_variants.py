"""Prints what is inferred when parts of a pair are taken away, and between networks that have nothing in common.

    python scripts/score_variants.py tests/inference/pairs/tuning.json.gz [--negatives] [--wrong] [--every N]

A variant lacks one module of every layer, a whole stack, or the second half of a stack's layers. It must make what the
whole pair makes of the tensors that are left, and nothing else. Pairs of which a tensor is wrong are left out.
`--negatives` pairs every source with the target of every other family; what is made is printed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from score_pairs import score, specs

import ckptsurgery as cs
from ckptsurgery.inference.stacks import stacks_of
from ckptsurgery.inference.units import read_units
from ckptsurgery.planning.planner import make_plan

Specs = Mapping[str, cs.TensorSpec]


def made(source: Specs, found: cs.Suggestion) -> dict[str, frozenset[str]]:
    """Each target key that a recipe makes, with its sources."""
    plan = make_plan(source, found.recipe, lambda name: found.recipe)
    result = {key: frozenset(step.sources) for step in plan.steps for key in step.targets}
    return result | {key: result[other] for key, other in plan.ties.items() if other in result}


def variants(source: Specs, target: Specs) -> Iterator[tuple[str, Specs, Specs]]:
    """A pair with parts taken away."""
    stacks = stacks_of(read_units(source.items()))
    parts: dict[tuple[str, str], set[str]] = {}
    for key in source:
        for stack in stacks:
            layer = stack.holds(key)
            if layer is not None:
                inside = key[len(stack.at) + len(str(layer)) :].lstrip("./_")
                part = re.sub(r"\d+", "#", re.split(r"[./]", inside)[0])
                parts.setdefault((stack.at, part), set()).add(key)
    for (at, part), keys in parts.items():
        yield f"without {at}#.{part}", {k: s for k, s in source.items() if k not in keys}, target
    for stack in stacks if len(stacks) > 1 else ():
        yield f"without {stack.at}", {k: s for k, s in source.items() if stack.holds(k) is None}, target
    for side, whole in enumerate((source, target)):
        for stack in stacks_of(read_units(whole.items())):
            layers = sorted(stack.layers)
            kept = {None, *layers[: max(1, len(layers) // 2)]}
            if len(layers) > 1:
                less = {k: s for k, s in whole.items() if stack.holds(k) in kept}
                ends = (less, target) if side == 0 else (source, less)
                yield f"{('source', 'target')[side]} with half of {stack.at}", *ends


def score_variants(pairs: list[dict[str, Any]], every: int, listing: bool) -> str:
    """Print the variants with mistakes; return the totals."""
    count = known = right = wrong = spurious = unnamed = 0
    for pair in pairs:
        whole = score(pair)
        if whole.wrong or whole.spurious or pair["kind"] != "plain":
            continue
        source, target = specs(pair["source"]), specs(pair["target"])
        truth = made(source, cs.suggest(source, target))
        for label, one, two in list(variants(source, target))[::every]:
            found = cs.suggest(one, two)
            result, named = made(one, found), {k for a in found.assumptions for k in a.keys}
            wanted = {k: sources for k, sources in truth.items() if k in two and sources <= one.keys()}
            well = sum(result.get(k) == sources for k, sources in wanted.items())
            ill = [k for k in result if k in wanted and result[k] != wanted[k]]
            more = [k for k in result if k in truth and k not in wanted]
            count, known, right = count + 1, known + len(wanted), right + well
            wrong, spurious = wrong + len(ill), spurious + len(more)
            unnamed += sum(k not in named for k in (*ill, *more))
            if ill or more:
                print(f"{pair['name']:36}{label:50} wrong {len(ill):3}, spurious {len(more):3}")
            for key in (*ill, *more) if listing else ():
                print(f"    {key} <- {', '.join(sorted(result[key]))}{'' if key in named else '  UNNAMED'}")
    share = right / max(1, known)
    return (
        f"{count} variants {known} tensors: right {share:.1%}, wrong {wrong}, spurious {spurious} ({unnamed} unnamed)"
    )


def score_negatives(pairs: list[dict[str, Any]], every: int) -> str:
    """Print the pairs of different families of which something is made; return the totals."""
    plain = [pair for pair in pairs if pair["kind"] == "plain"]
    listed = [(one, two) for one in plain for two in plain if one["family"] != two["family"]][::every]
    claims = 0
    for one, two in listed:
        source, target = specs(one["source"]), specs(two["target"])
        count = len(made(source, cs.suggest(source, target)))
        claims += count > 0
        if count:
            print(f"{one['name']:32}-> {two['name']:32} made {count:3} of {len(target):3}")
    return f"{len(listed)} negatives, {claims} of which something is made"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--negatives", action="store_true", help="pairs of different families instead")
    parser.add_argument("--wrong", action="store_true", help="list what is wrong or spurious, with its sources")
    parser.add_argument("--only", default="", help="pairs whose names contain this")
    parser.add_argument("--every", type=int, default=1, help="only every N-th case")
    options = parser.parse_args()
    listed = json.loads(gzip.decompress(options.pairs.read_bytes()))
    pairs = [pair for pair in listed if options.only in pair["name"]]
    if options.negatives:
        print(score_negatives(pairs, options.every))
    else:
        print(score_variants(pairs, options.every, options.wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
