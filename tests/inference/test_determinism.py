"""The same answer in every process, and for every order of the keys that is not a model's definition."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import ckptsurgery as cs
from ckptsurgery.inference.by_names import ordered

Specs = dict[str, cs.TensorSpec]
DATA = Path(__file__).parent.parent / "data" / "corpus"
SIDES = ("source", "target")
WORDS = ("x", "7", "a.b", "weight", "{q}", "out", "qkv_gate", "norm_mlp")


def corpus() -> list[tuple[Specs, Specs]]:
    found = []
    for path in sorted(DATA.glob("*.json.gz")):
        pair = json.loads(gzip.decompress(path.read_bytes()))
        sides = ({k: cs.TensorSpec(tuple(v["shape"]), v["dtype"]) for k, v in pair[s].items()} for s in SIDES)
        found.append(tuple(sides))
    return found


def generated(count: int) -> list[tuple[Specs, Specs]]:
    """Pairs of the corpus with keys missing, renamed and out of order, and pairs of unlike models."""
    pairs = corpus()
    found = []
    for number in range(count):
        draw = random.Random(number)
        one, other = draw.choice(pairs), draw.choice(pairs)
        found.append((damaged(one[0], draw), damaged(one[1] if draw.random() < 0.8 else other[1], draw)))
    return found


def damaged(side: Specs, draw: random.Random) -> Specs:
    share = draw.choice([0.0, 0.05, 0.3, 0.5])
    kept = [key for key in side if draw.random() >= share] or list(side)
    word = draw.choice(["", *(w for key in list(side)[:5] for w in key.split(".") if w.isalpha())])
    new = draw.choice(WORDS)
    if draw.random() < 0.5:
        draw.shuffle(kept)
    return {(k.replace(word, new) if word and draw.random() < 0.7 else k): side[k] for k in kept}


def answers(count: int) -> list[str]:
    """Every answer as text; called in a process of its own."""
    return [json.dumps(cs.suggest(*pair).to_json()) for pair in (*corpus(), *generated(count))]


def test_no_answer_depends_on_the_hash_seed() -> None:
    command = [sys.executable, "-c", "import json, test_determinism as t; print(json.dumps(t.answers(75)))"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    seeds = ({**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed} for seed in ("0", "1", "2"))
    running = [subprocess.Popen(command, env=seed, stdout=subprocess.PIPE) for seed in seeds]
    said = [child.communicate()[0] for child in running]
    first, *others = map(json.loads, said)
    assert len(first) == 48 + 75
    for other in others:
        assert [n for n, (a, b) in enumerate(zip(first, other, strict=True)) if a != b] == []


@pytest.mark.parametrize("seed", [1, 2])
def test_no_answer_depends_on_an_order_that_is_no_definition(seed: int) -> None:
    draw = random.Random(seed)
    compared = 0
    for source, target in corpus():
        sides = [dict(sorted(side.items())) for side in (source, target)]
        mixed = [{key: side[key] for key in draw.sample(list(side), len(side))} for side in (source, target)]
        if not any(map(ordered, mixed)):
            compared += 1
            assert str(cs.suggest(*mixed)) == str(cs.suggest(*sides))
    assert compared > 30
