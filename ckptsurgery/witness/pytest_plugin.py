"""Fixtures for tests of code that loads models; a test suite asks for them by `pytest_plugins`.

pytest_plugins = ["ckptsurgery.witness.pytest_plugin"]

def test_the_server_loads_all_of_it(check_loaded):
    model = build_and_load("model.safetensors")
    check_loaded(model, "model.safetensors")
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from .faults import NotAsPlanned
from .loaded import check_loaded as check
from .watching import LoadWatch
from .watching import watch_load as watch

__all__ = ["check_loaded", "watch_load"]


@pytest.fixture
def check_loaded() -> Callable[..., object]:
    """`cs.check_loaded`, whose findings fail the test by themselves, without a traceback of this library."""

    @functools.wraps(check)
    def checked(*args: object, **named: object) -> object:
        with _failing():
            return check(*args, **named)  # type: ignore[arg-type]

    return checked


@pytest.fixture
def watch_load() -> Callable[..., object]:
    """`cs.watch_load` as a context, whose findings fail the test by themselves."""

    @contextmanager
    @functools.wraps(watch)
    def watched(*args: object, **named: object) -> Iterator[LoadWatch]:
        with _failing(), watch(*args, **named) as seen:  # type: ignore[arg-type]
            yield seen

    return watched


@contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except NotAsPlanned as error:
        pytest.fail(str(error), pytrace=False)
