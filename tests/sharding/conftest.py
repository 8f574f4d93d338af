from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_group import Group


@pytest.fixture(scope="session")
def two() -> Iterator[Group]:
    """Two processes."""
    group = Group(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def three() -> Iterator[Group]:
    """Three processes, which divide nothing evenly."""
    group = Group(3)
    yield group
    group.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Group]:
    """Four processes."""
    group = Group(4)
    yield group
    group.close()
