"""Values of a file that only running code would make: they are named, and never made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError, Diagnostic
from .inert import Opaque
from .pickle_calls import POWERFUL

__all__ = ["powerful", "refuse_code"]

_HARMLESS = frozenset(
    {"slice", "range", "xrange", "object", "type", "bytes", "bytearray", "complex", "SimpleNamespace"}
)
_TOLD = 50  # problems of one kind that an error lists


def refuse_code(extras: Mapping[str, Any], source: str) -> None:
    """Raise for values that only running code would make; each is named."""
    problems: list[Diagnostic] = []
    for key, value in extras.items():
        if len(problems) == _TOLD:
            break
        function = powerful(value, 6)
        if function is not None:
            problems.append(
                Diagnostic("unsafe-pickle", f"{key!r} would be made by running {function}, which is never done",
                           place=source, help=f"save it again as a plain tensor where {source!r} was written")
            )  # fmt: skip
    if problems:
        raise CheckpointError(problems)


def powerful(value: Any, depth: int) -> str | None:
    """The function of the outside world that `value` is the result of, if any."""
    if depth <= 0 or type(value) is not Opaque or value.args is None:
        return None
    if value.module in POWERFUL and value.note is None and value.name not in _HARMLESS:
        return value.path
    if type(value.args) is tuple:
        for arg in value.args[:8]:
            found = powerful(arg, depth - 1)
            if found is not None:
                return found
    return None
