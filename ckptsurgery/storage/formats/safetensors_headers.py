"""Safetensors headers written the way that nearly all are, read by pattern straight into columns.

As JSON, the rows of 100,000 tensors are 300,000 objects and lists of which nothing is kept. A pattern finds what
is kept in half the time. What it cannot prove to be sound it leaves to the reader of JSON, which says what is wrong.
"""

from __future__ import annotations

import json
import math
import re
from operator import sub
from typing import Any, NamedTuple

from ...specs import DTYPES, TensorSpec
from ..shapes import shape_problem

__all__ = ["PlainHeader", "read_plain_header"]

_METADATA = re.compile(r'\{"__metadata__": ?(\{(?:"(?:[^"\\]|\\.)*+"[:, ]*+)*+\}), ?')
_NAME = r'"([^"\\\x00-\x1f]++)"'
_INTEGER = "(0|[1-9][0-9]{0,17})"
_QUOTES = 10  # in a row


class PlainHeader(NamedTuple):
    """The rows of a header as columns, in the header's order, and its metadata."""

    names: tuple[str, ...]
    specs: list[TensorSpec]
    begins: list[int]
    metadata: dict[str, str]


class _RowPattern(NamedTuple):
    """A way to write rows; the pattern's groups are the name, then the spec and the offsets, or these before it."""

    row: re.Pattern[str]
    spec_first: bool


def _layout(comma: str, colon: str, spec_first: bool) -> _RowPattern:
    spec = rf'("dtype"{colon}"[A-Z0-9_]++"{comma}"shape"{colon}\[[0-9, ]*+\])'
    offsets = rf'"data_offsets"{colon}\[{_INTEGER}{comma}{_INTEGER}\]'
    fields = comma.join([spec, offsets] if spec_first else [offsets, spec])
    return _RowPattern(re.compile(rf'{_NAME}{colon}\{{{fields}\}}(?={comma}"|\}}\Z)'), spec_first)


# As the reference writes and as Python's json does, the fields in the reference's order or by name.
_LAYOUTS = tuple(_layout(*marks, first) for marks in ((",", ":"), (", ", ": ")) for first in (True, False))


def read_plain_header(text: str, size: int) -> PlainHeader | None:
    """The header as columns, proved to describe `size` bytes of data without a hole; None where that is not certain.

    >>> header = read_plain_header('{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}', 24)
    >>> header.names, header.specs, header.begins
    (('w',), [TensorSpec(shape=(2, 3), dtype='F32')], [0])
    >>> read_plain_header('{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}', 30) is None
    True
    """
    text = text.rstrip(" ")
    try:
        metadata, start = _metadata(text)
        rows, spec_first = _rows(text, start)
        names, *columns = zip(*rows)
        written = columns.pop(0 if spec_first else 2)
        begins, ends = (list(map(int, column)) for column in columns)
        known = {one: _spec(one) for one in set(written)}
    except ValueError:
        return None
    sizes = {one: spec.nbytes for one, spec in known.items()}
    if list(map(sub, ends, begins)) != list(map(sizes.__getitem__, written)) or not _tile(begins, ends, size):
        return None
    return PlainHeader(names, list(map(known.__getitem__, written)), begins, metadata)


def _metadata(text: str) -> tuple[dict[str, str], int]:
    """The metadata at the start of a header, and where the first row has to begin."""
    if not text.startswith('{"__metadata__"'):
        return {}, 1
    found = _METADATA.match(text)
    pairs: list[tuple[str, str]] = json.loads(found[1], object_pairs_hook=list) if found else []
    if found is None or len(metadata := dict(pairs)) != len(pairs):
        raise ValueError
    return metadata, found.end()


def _rows(text: str, start: int) -> tuple[list[Any], bool]:
    """What the pattern of the first row finds, where that is everything from there to the end."""
    for row, spec_first in _LAYOUTS:
        if row.match(text, start):
            # Each row is followed by the quote that begins the next one, or by the end: were there anything between
            # two that were found, there would be a quote too many.
            rows = row.findall(text, start)
            if text.count('"', start) == _QUOTES * len(rows) and text[0] == "{":
                return rows, spec_first
    raise ValueError


def _spec(written: str) -> TensorSpec:
    row = json.loads(f"{{{written}}}")
    dtype = DTYPES.get(row["dtype"])
    shape: list[int] = row["shape"]
    if dtype is None or not dtype.safetensors or shape_problem(shape, dtype.bits) or math.prod(shape) * dtype.bits % 8:
        raise ValueError
    return TensorSpec(shape, dtype.name)


def _tile(begins: list[int], ends: list[int], size: int) -> bool:
    """Whether the ranges follow each other from 0 to the end, in whatever order they are given."""
    if begins[1:] != ends[:-1]:
        begins, ends = map(list, zip(*sorted(zip(begins, ends))))
    return begins[0] == 0 and ends[-1] == size and begins[1:] == ends[:-1]
