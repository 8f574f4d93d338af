"""The arguments of a load, checked by themselves before anything is opened."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from ..errors import Diagnostic, LoadError, Remedy
from ..planning.targets import DTYPE_POLICIES

__all__ = ["check_arguments", "listed"]


def listed(argument: str, what: Any) -> tuple[str, ...]:
    """The paths that an argument names: one, or several.

    Raises:
        LoadError: they are not strings.
    """
    if what is None or isinstance(what, str):
        return (what,) if what is not None else ()
    paths = tuple(what) if isinstance(what, Iterable) else (what,)
    if not all(isinstance(path, str) for path in paths):
        help = f'{argument}="head", or a list of such paths'
        raise LoadError(Diagnostic("bad-argument", f"{argument}={what!r} names no part of a model", help=help))
    return paths


def check_arguments(mismatch: str, dtype: str, assign: bool) -> None:
    """Check the arguments of a load by themselves.

    Raises:
        LoadError: a value that is not known, or two that do not go together.
    """
    for name, value, known in (("mismatch", mismatch, ("error", "init", "keep")), ("dtype", dtype, DTYPE_POLICIES)):
        if value not in known:
            near = get_close_matches(str(value), known, 1)
            instead = (Remedy(name, {str(value): near}, kind="instead"),) if near else ()
            advice = "one of " + ", ".join(map(repr, known))
            raise LoadError(Diagnostic("bad-argument", f"{name}={value!r}", remedies=instead, advice=advice))
    if dtype == "source" and not assign:
        text = 'dtype="source" keeps the source\'s dtype, which a copy cannot'
        raise LoadError(Diagnostic("bad-argument", text, remedies=(Remedy("assign", True),)))
