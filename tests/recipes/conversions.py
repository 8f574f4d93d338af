"""The corpus of real conversions: what each pair holds, and its source filled with numbers."""

from __future__ import annotations

import gzip
import hashlib
import json
import tomllib
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch

import ckptsurgery as cs

DATA = Path(__file__).parent.parent / "data"
SERVES: dict[str, dict[str, Any]] = tomllib.loads((DATA / "corpus_recipes.toml").read_text())
PAIRS = sorted(p.name.removesuffix(".json.gz") for p in (DATA / "corpus").glob("*.json.gz"))

Specs = dict[str, cs.TensorSpec]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """One network in two codebases.

    Args:
        source, target: headers. config: numbers that no shape shows.
        expected: target key -> hash of the numbers that it must hold.
        unmatched_source, unmatched_target: keys without a counterpart.
        tied_source: groups of source keys that are one tensor. tied_target: the same of the target.
    """

    source: Specs
    target: Specs
    config: dict[str, Any] | None
    expected: dict[str, str]
    unmatched_source: set[str]
    unmatched_target: set[str]
    tied_source: list[list[str]]
    tied_target: list[list[str]]

    def headers(self) -> Tensors:
        """The source without data."""
        dtypes = {"F32": torch.float32, "I64": torch.int64}
        return {k: torch.empty(s.shape, dtype=dtypes[s.dtype], device="meta") for k, s in self.source.items()}

    def numbered(self) -> Tensors:
        """The source with its elements numbered 0, 1, 2, … in the order of its keys; tied keys are one tensor."""
        filled: Tensors = {}
        start = 0
        for key, spec in self.source.items():
            count = prod(spec.shape)
            filled[key] = torch.arange(start, start + count).reshape(spec.shape)
            start += count
        for first, *others in self.tied_source:
            filled.update(dict.fromkeys(others, filled[first]))
        return filled


@cache
def pair(name: str) -> Pair:
    """Read a pair."""
    data = json.loads(gzip.decompress((DATA / "corpus" / f"{name}.json.gz").read_bytes()))
    return Pair(
        source=_specs(data["source"]),
        target=_specs(data["target"]),
        config=data.get("config"),
        expected=data["expected"],
        unmatched_source=set(data.get("unmatched_source", ())),
        unmatched_target=set(data.get("unmatched_target", ())),
        tied_source=data["tied_source"],
        tied_target=data["tied_target"],
    )


def recipe_for(name: str) -> cs.Recipe:
    """The recipe that serves a pair."""
    entry = SERVES[name]
    recipe = cs.load_recipe(entry["recipe"])
    recipe = recipe.inverse() if entry.get("inverse") else recipe
    return recipe.then(cs.load_recipe(entry["then"])) if "then" in entry else recipe


def hashes(tensors: Tensors) -> dict[str, str]:
    """The hash of each tensor's numbers, as the corpus takes it."""
    return {k: hashlib.sha256(t.contiguous().numpy().astype("<i8").tobytes()).hexdigest() for k, t in tensors.items()}


def same(a: Tensors, b: Tensors) -> bool:
    """Whether both hold the same keys and numbers."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _specs(side: dict[str, dict[str, Any]]) -> Specs:
    return {k: cs.TensorSpec(tuple(v["shape"]), getattr(torch, v["dtype"])) for k, v in side.items()}
