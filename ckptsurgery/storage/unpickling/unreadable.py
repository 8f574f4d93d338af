"""Tensors of a file that cannot be read (sparse, quantised, sharded): one diagnostic that names each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import CheckpointError, Diagnostic, Remedy
from ...wording import counted
from .inert import Array, Opaque
from .nodes import holds_tensors, is_lost, is_state, lost
from .powers import powerful

__all__ = ["told_apart", "unreadable_tensors"]

_SHOWN = 200  # names that an error lists; the count is exact


def unreadable_tensors(
    lost: Mapping[str, str], remedies: Sequence[Remedy] = (), place: str | None = None, help: str | None = None
) -> Diagnostic:
    """Return the diagnostic for tensors that cannot be read.

    >>> print(unreadable_tensors({"w": "a sparse tensor"}))
    error[unreadable-tensors]: 1 tensor cannot be read: w: a sparse tensor
     = help: save it as a plain tensor where the file was written

    Args:
        lost: key -> its kind.
        remedies: how to go on without them.
        place: the source.
        help: a sentence, where no argument settles it; how to save them otherwise, by default.
    """
    lines = [f"{key}: {why}" for key, why in lost.items()]
    more = [f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    saved = f"save {'it as a plain tensor' if len(lost) == 1 else 'them as plain tensors'} where the file was written"
    return Diagnostic(
        "unreadable-tensors",
        f"{counted(len(lost), 'tensor')} cannot be read: {lines[0]}" + (", …" if len(lines) > 1 else ""),
        place=place,
        notes=(*lines[:_SHOWN], *more) if len(lines) > 1 else (),
        help=help if help is not None or remedies else saved,
        remedies=tuple(remedies),
    )


def told_apart(leaves: dict[str, Any], rest: dict[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors that can be read, and the rest with records of those that cannot.

    Args:
        leaves: a model's tensors by key. rest: what else it holds.

    Raises:
        CheckpointError: none can be read.
    """
    hidden = {key: _with_tensors(key, value) for key, value in rest.items()}
    records: dict[str, Opaque] = {key: record for key, record in hidden.items() if record is not None}
    for key, leaf in leaves.items():
        if is_lost(leaf):
            records[key] = leaf if type(leaf) is Opaque else lost(f"a numpy array of {leaf!r}")
    if not records:
        return leaves, rest
    left = {key: leaf for key, leaf in leaves.items() if key not in records}
    if not left:
        kinds = {key: record.note or "" for key, record in records.items()}
        raise CheckpointError(unreadable_tensors(kinds, place=source))
    return left, rest | records


def _with_tensors(key: str, value: Any) -> Opaque | None:
    """A record of an object that is no tensor, and has tensors among its parts."""
    if type(value) not in (Opaque, Array) or is_lost(value) or is_state(key) or not holds_tensors(value):
        return None
    if type(value) is Array:
        return lost("a numpy array of objects, with tensors in it")
    return lost(f"an object of {value.path}, with tensors in it") if powerful(value, 6) is None else None
