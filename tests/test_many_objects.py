"""What is made while the garbage collector pauses."""

from __future__ import annotations

import gc
import weakref

import pytest

from ckptsurgery.many_objects import gc_pause


class Ring:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.ring = self


@pytest.mark.parametrize("count", [10, 100_000])
def test_what_is_made_meanwhile_is_still_collected_once_nothing_holds_it(count: int) -> None:
    with gc_pause():
        made = [Ring() for _ in range(count)]
    assert gc.isenabled()
    last = weakref.ref(made[-1])
    del made
    gc.collect()
    assert last() is None


def test_very_many_are_old_when_it_ends_and_what_was_frozen_stays_so() -> None:
    with gc_pause():
        made = [Ring() for _ in range(100_000)]
    assert id(made[-1]) in {id(one) for one in gc.get_objects(2)}
    gc.freeze()
    try:
        with gc_pause():
            more = [Ring() for _ in range(100_000)]
        assert gc.get_freeze_count() >= len(made)
        assert len(more) == 100_000
    finally:
        gc.unfreeze()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with gc_pause():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
