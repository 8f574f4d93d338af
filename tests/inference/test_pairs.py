"""Recipes inferred on pairs built by published converters: one half that was tuned on, and two sets that were not.

`scripts/score_pairs.py` prints the same numbers pair by pair.
"""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

PAIRS = Path(__file__).parent / "pairs"
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))
score = importlib.import_module("score_pairs").score


BARS = [("tuning", 0.98, 0.01), ("held", 0.96, 0.001), ("fresh", 0.96, 0.005)]


@pytest.mark.parametrize(("half", "right", "wrong"), BARS)
def test_a_set_is_nearly_all_right_and_no_wrong_tensor_goes_unnamed(half: str, right: float, wrong: float) -> None:
    scores = [score(pair) for pair in json.loads(gzip.decompress((PAIRS / f"{half}.json.gz").read_bytes()))]
    known = sum(s.known for s in scores)
    assert sum(len(s.right) for s in scores) >= right * known
    assert sum(len(s.wrong) for s in scores) <= wrong * known
    assert [k for s in scores for k in s.unnamed] == []
    assert [k for s in scores if s.kind in ("negative", "depth") for k in s.spurious] == []
    assert [s.fails for s in scores if s.fails] == []
