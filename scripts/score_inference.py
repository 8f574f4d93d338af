"""Prints how well recipes are inferred from names and shapes on a corpus of real conversions.

    python scripts/score_inference.py CORPUS [--only TEXT] [--wrong] [--ablate]

CORPUS is a folder of `*.json` or `*.json.gz`. A line a pair; then the totals, plain and with each family left out: the
vocabulary is written by hand, and a family is left out by forgetting every word that, of all pairs, its own alone use.
`--ablate` takes away one kind of evidence after the other.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

import ckptsurgery as cs
from ckptsurgery.inference import assignment, evidence, norms, roles, vocabulary
from ckptsurgery.language.toml import loads


@dataclass
class Score:
    """What one pair gave: counts of target tensors, and whether each wrong one was named by an assumption."""

    name: str
    right: int
    wrong: list[str]
    open: list[str]
    unnamed: int
    seconds: float
    rules: int
    fails: str = ""  # why the recipe does not run, where it does not: everything is open then

    @property
    def whole(self) -> bool:
        """Whether every tensor is right."""
        return not self.wrong and not self.open


def pairs(corpus: Path, only: str) -> list[tuple[str, dict[str, Any]]]:
    """The corpus: name and content of each pair."""
    found = []
    for path in sorted(p for p in corpus.iterdir() if p.name.endswith((".json", ".json.gz"))):
        name = path.name.split(".json")[0]
        if only in name:
            data = path.read_bytes()
            found.append((name, json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)))
    return found


def specs(side: dict[str, Any]) -> dict[str, cs.TensorSpec]:
    """A side's headers."""
    return {k: cs.TensorSpec(tuple(v["shape"]), v["dtype"]) for k, v in side.items()}


def numbered(side: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A side's tensors, their elements numbered through."""
    result, at = {}, 0
    for key, spec in side.items():
        size = prod(spec["shape"])
        result[key] = torch.arange(at, at + size).reshape(spec["shape"])
        at += size
    return result


def digest(tensor: torch.Tensor) -> str:
    """The hash of a tensor's numbers."""
    return hashlib.sha256(tensor.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def score(name: str, pair: dict[str, Any]) -> Score:
    """Infer a recipe, read it back from its text, run it, and hold what it makes against the truth."""
    source, target = specs(pair["source"]), specs(pair["target"])
    start = time.process_time()
    found = cs.suggest(source, target)
    result = Score(name, 0, [], [], 0, time.process_time() - start, len(found.recipe.rules))
    named = {k for a in found.assumptions for k in a.keys}
    try:
        made = cs.plan(numbered(pair["source"]), loads(found.recipe.dumps())).state_dict()
    except cs.CkptSurgeryError as error:
        made, result.fails = {}, error.diagnostics[0].headline
    for key, wanted in pair["expected"].items():
        if key not in made:
            result.open.append(key)
        elif digest(made[key]) == wanted:
            result.right += 1
        else:
            result.wrong.append(key)
            result.unnamed += key not in named
    return result


def totals(label: str, scores: Sequence[Score]) -> None:
    """One line for many pairs."""
    right, wrong, unknown = (sum(n) for n in zip(*((s.right, len(s.wrong), len(s.open)) for s in scores)))
    total = right + wrong + unknown
    print(
        f"{label:24}{len(scores):3} pairs {total:5} tensors: right {right / total:7.2%}, wrong {wrong / total:6.2%}"
        f" ({sum(s.unnamed for s in scores)} unnamed), open {unknown / total:6.2%};"
        f" whole {sum(s.whole for s in scores):2};"
        f" slowest {max(s.seconds for s in scores):.2f} s CPU"
    )


@contextmanager
def forgetting(words: set[str]) -> Iterator[None]:
    """The vocabulary without some words."""
    table = vocabulary._WORDS
    gone = {phrase: bag for phrase, bag in table.items() if words & set(phrase)}
    caches = (vocabulary.concepts, roles.part_of, norms.is_norm, norms.stage)
    for phrase in gone:
        del table[phrase]
    for cache in caches:
        cache.cache_clear()
    yield
    table.update(gone)
    for cache in caches:
        cache.cache_clear()


def spoken(pair: dict[str, Any]) -> set[str]:
    """The words in a pair's keys."""
    keys = {k for side in ("source", "target") for k in pair[side]}
    return {w for k in keys for segment in k.replace("/", ".").split(".") for w in vocabulary.words(segment)}


def left_out(corpus: Sequence[tuple[str, dict[str, Any]]]) -> list[Score]:
    """Every family scored without the words that only its own pairs use."""
    families: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for name, pair in corpus:
        families[pair["family"]].append((name, pair))
    found = []
    for family, members in families.items():
        own = set().union(*(spoken(p) for _, p in members))
        others = set().union(*(spoken(p) for _, p in corpus if p["family"] != family))
        with forgetting(own - others):
            found += [score(name, pair) for name, pair in members]
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--only", default="", help="pairs whose names contain this")
    parser.add_argument("--wrong", action="store_true", help="list what is wrong or open")
    parser.add_argument("--ablate", action="store_true", help="without each kind of evidence in turn")
    options = parser.parse_args()
    corpus = pairs(options.corpus, options.only)
    print(f"{'pair':46}{'right':>6}{'wrong':>6}{'open':>6}{'rules':>6}{'s':>7}  whole")
    scores = []
    for name, pair in corpus:
        one = score(name, pair)
        scores.append(one)
        whole = "yes" if one.whole else "no"
        print(f"{name:46}{one.right:6}{len(one.wrong):6}{len(one.open):6}{one.rules:6}{one.seconds:7.2f}  {whole}")
        if one.fails:
            print(f"    does not plan: {one.fails}")
        for label, keys in (("wrong", one.wrong), ("open", one.open)):
            for key in keys if options.wrong else ():
                print(f"    {label:6}{key}")
    totals("plain", scores)
    if len({pair["family"] for _, pair in corpus}) > 1:
        totals("each family left out", left_out(corpus))
    for table in (evidence.WEIGHTS, assignment.VOTES) if options.ablate else ():
        for kind in list(table):
            kept, table[kind] = table[kind], 0.0  # type: ignore[index]
            totals(f"without {kind}", [score(name, pair) for name, pair in corpus])
            table[kind] = kept  # type: ignore[index]
    return 0


if __name__ == "__main__":
    sys.exit(main())
