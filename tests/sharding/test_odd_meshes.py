"""Uneven, strided, replicated, tied, frozen and ignored: what ranks load, save and reshard is what one process does."""

from __future__ import annotations

from pathlib import Path

import odd_cases
import pytest
import torch
from rank_group import Group
from safetensors.torch import load_file


@pytest.mark.parametrize("case", odd_cases.CASES)
@pytest.mark.parametrize("ranks", ["two", "three", "four"])
def test_ranks_do_what_one_process_does(case: str, ranks: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    group: Group = request.getfixturevalue(ranks)
    assert [line for lines in group(odd_cases.check, case, str(tmp_path)) for line in lines] == []


def test_a_rank_may_hold_no_columns(three: Group, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert three(odd_cases.fewer_columns_than_ranks, str(path)) == [True] * 3
    assert torch.equal(load_file(path)["w"], odd_cases.numbers(5, 2))


def test_a_table_that_no_file_holds_is_computed_and_distributed(three: Group) -> None:
    assert three(odd_cases.computed_tables) == [[True] * 4] * 3
