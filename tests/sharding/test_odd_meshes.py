"""Uneven, strided, replicated, tied, frozen and ignored: what ranks load, save and reshard is what one process does."""

from __future__ import annotations

from pathlib import Path

import odd_cases
import pytest
from rank_group import Group


@pytest.mark.parametrize("case", odd_cases.CASES)
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_ranks_do_what_one_process_does(case: str, ranks: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    group: Group = request.getfixturevalue(ranks)
    assert [line for lines in group(odd_cases.check, case, str(tmp_path)) for line in lines] == []
