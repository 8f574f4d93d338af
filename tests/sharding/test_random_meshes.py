"""Ranks together do what one process does, on random meshes; `scripts/fuzz/meshes.py` runs more cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_cases
from rank_group import Group


@pytest.mark.parametrize("seed", [7, 12, 20, 24])
def test_random_cases_on_two_ranks(seed: int, two: Group, tmp_path: Path) -> None:
    assert two(random_cases.check, seed, str(tmp_path)) == [[]] * 2


@pytest.mark.parametrize("seed", [2, 4, 6, 10, 15])
def test_tensors_of_which_some_ranks_hold_no_part(seed: int, four: Group, tmp_path: Path) -> None:
    assert four(random_cases.on_some_ranks, seed, str(tmp_path)) == [[]] * 4


@pytest.mark.parametrize("seed", [3, 5, 10, 27, 41])
def test_random_cases_on_four_ranks(seed: int, four: Group, tmp_path: Path) -> None:
    assert four(random_cases.check, seed, str(tmp_path)) == [[]] * 4
