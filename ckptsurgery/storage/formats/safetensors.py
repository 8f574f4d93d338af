"""The safetensors format: a header of JSON, checked as strictly as the bytes that it points to deserve."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from dataclasses import dataclass
from operator import sub
from typing import Any, NamedTuple

from ...errors import CheckpointError, Diagnostic
from ...specs import DTYPES, TensorSpec, shape_problem
from ...wording import is_text, shown_keys
from ..contents import Contents, Entry, entries_in
from ..json_text import refuse_brackets
from ..metadata_records import aliases_in, own_metadata
from .format import OpenedSource, opening

__all__ = ["CHANGING", "MAX_HEADER", "PlainHeader", "read_plain_header", "read_safetensors", "read_safetensors_at"]

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


CHANGING = b"!"
"""What stands where a header begins while it is being changed in place."""

MAX_HEADER = 100_000_000
_FIELDS = {"dtype", "shape", "data_offsets"}
_GET_AGAIN = "download or write the file again"


def read_safetensors(path: str | os.PathLike[str] | OpenedSource, subtree: str | None = None) -> Contents:
    """What a safetensors file holds, from its header alone.

    Aliases that `save_model` wrote into the metadata come out as keys. `subtree` is a dotted prefix to enter.

    Raises:
        CheckpointError: the header is no such thing, or does not describe the file exactly.
    """
    from ..subtree import enter

    with opening(path) as opened:
        header = _Header.read(opened)
    entries, metadata = _read_plainly(header) or _read_precisely(header)
    aliases = aliases_in(metadata, entries)
    for alias, kept in aliases.items():
        entries[alias] = entries[kept]
    contents = Contents(entries, aliases, own_metadata(metadata, aliases))
    return enter(contents, subtree, header.path) if subtree else contents


def read_safetensors_at(path: str, offset: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of a safetensors file that is the rest of another file, from a byte on."""
    with opening(path) as opened:
        header = _Header.read(opened, offset)
    return _read_plainly(header) or _read_precisely(header)


@dataclass(frozen=True, slots=True)
class _Header:
    path: str
    text: str
    start: int
    size: int

    @property
    def data_size(self) -> int:
        return self.size - self.start

    def problem(self, code: str, headline: str, help: str | None = None, notes: tuple[str, ...] = ()) -> Diagnostic:
        return Diagnostic(code, headline, self.path, notes=notes, help=help or _GET_AGAIN)

    @classmethod
    def read(cls, opened: OpenedSource, base: int = 0) -> _Header:
        path, size, file = opened.name, opened.size, opened.file
        file.seek(base)
        length = int.from_bytes(file.read(8), "little")
        _check_length(path, size - base, length)
        raw = file.read(length)
        if raw.startswith(CHANGING):
            text, help = "a change of this file in place was interrupted", f"ckptsurgery restore-header {path!r}"
            raise CheckpointError(Diagnostic("interrupted-change", text, path, help=help))
        try:
            return cls(path, raw.decode(), base + 8 + length, size)
        except UnicodeDecodeError as error:
            raise CheckpointError(
                Diagnostic(
                    "bad-header",
                    f"the header is not UTF-8: {error.reason} at byte {error.start}",
                    path,
                    help=_GET_AGAIN,
                )
            ) from None


def _check_length(path: str, size: int, length: int) -> None:
    if size < 8:
        problem = Diagnostic(
            "truncated-file", f"{size} bytes are no safetensors file", path, help="download or write the file again"
        )
    elif length > MAX_HEADER:
        problem = Diagnostic(
            "header-too-large",
            f"the header has a length of {length:,} bytes; {MAX_HEADER:,} is the limit",
            path,
            help="is it a safetensors file at all?",
        )
    elif 8 + length > size:
        problem = Diagnostic(
            "truncated-file",
            f"the header needs {8 + length:,} bytes, the file has {size:,}",
            path,
            help="download or write the file again",
        )
    elif length < 2:
        text = f"a header of {length} bytes cannot hold a JSON object"
        problem = Diagnostic("bad-header", text, path, help=_GET_AGAIN)
    else:
        return
    raise CheckpointError(problem)


def _read_plainly(header: _Header) -> tuple[dict[str, Entry], dict[str, str]] | None:
    """Entries and metadata of a header that is sound and written as usual; None for all others."""
    plain = read_plain_header(header.text, header.data_size)
    if plain is None:
        return None
    names, specs, begins, metadata = plain
    entries = dict(zip(names, entries_in(header.path, specs, map(header.start.__add__, begins))))
    if len(entries) < len(names) or "__metadata__" in entries:
        return None
    _check_metadata(header, metadata)
    return entries, metadata


def _read_precisely(header: _Header) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata by way of JSON, or everything that is wrong with them."""
    try:
        refuse_brackets(header.text)
        rows = _unique_rows(header)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(header.problem("bad-header", f"the header is not valid JSON: {error}")) from None
    metadata = rows.pop("__metadata__", {})
    _check_metadata(header, metadata)
    problems = _problems(rows, header)
    if problems:
        raise CheckpointError(problems)
    path, start = header.path, header.start
    return {
        name: Entry(TensorSpec(row["shape"], row["dtype"]), path, start + row["data_offsets"][0])
        for name, row in rows.items()
    }, metadata


class _NoInteger:
    """A number that no header holds: to Python 2.0 equals 2, and would pass for a size."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text[:40]


def _unique_rows(header: _Header) -> dict[str, Any]:
    """The header's JSON, an object in which nothing is given twice."""
    twice: list[tuple[set[str], list[str]]] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            names = [name for name, _ in pairs if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
            twice.append((set(found), names))
        return found

    rows = json.loads(header.text, object_pairs_hook=collect, parse_float=_NoInteger, parse_constant=_NoInteger)
    if not isinstance(rows, dict):
        raise CheckpointError(
            header.problem("bad-header", f"the header is a JSON {type(rows).__name__}, not an object")
        )
    problems = []
    for fields, names in twice:
        if fields == set(rows):
            text = (
                f"{len(names)} tensor names are given twice in the header"
                if len(names) > 1
                else f"the tensor {names[0]!r} is given twice"
            )
            problems.append(
                header.problem("duplicate-tensor", text, "write the file again, each name once", shown_keys(names))
            )
        elif fields & _FIELDS:
            problems.append(
                header.problem(
                    "duplicate-field", f"a tensor gives {', '.join(names)} twice", notes=shown_keys(sorted(fields))
                )
            )
        else:
            problems.append(
                header.problem("duplicate-metadata", "the metadata gives a key twice", notes=shown_keys(names))
            )
    if problems:
        raise CheckpointError(problems)
    return rows


def _check_metadata(header: _Header, metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise CheckpointError(header.problem("bad-metadata", "__metadata__ is not a JSON object of strings"))
    if metadata.keys() >= _FIELDS and not all(isinstance(metadata[field], str) for field in _FIELDS):
        raise CheckpointError(
            header.problem(
                "reserved-name",
                "a tensor is called '__metadata__', which safetensors reserves",
                "write the file again with another name",
            )
        )
    wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
    if wrong:
        raise CheckpointError(
            header.problem("bad-metadata", "metadata values must be strings", notes=shown_keys(wrong))
        )
    if "\\" in header.text:
        odd = [repr(key) for key, value in metadata.items() if not (is_text(key) and is_text(value))]
        if odd:
            raise CheckpointError(
                header.problem("bad-metadata", "half of a surrogate pair stands in the metadata", notes=shown_keys(odd))
            )


def _row_problem(row: Any) -> tuple[str, str] | None:
    """(code, text) for what is wrong with one row on its own."""
    if not isinstance(row, dict) or not row.keys() >= _FIELDS:
        return "bad-entry", "has not dtype, shape and data_offsets"
    if len(row) != len(_FIELDS):
        return "unknown-field", "has unknown fields: " + ", ".join(sorted(row.keys() - _FIELDS))
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES or not DTYPES[dtype].safetensors:
        return "unknown-dtype", f"has the dtype {reprlib.repr(dtype)}, which safetensors does not know"
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        return "bad-shape", f"has the shape {reprlib.repr(shape)}, which is none"
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
        return "bad-offsets", f"has the offsets {reprlib.repr(offsets)}; two non-negative integers are expected"
    absurd = shape_problem(shape, DTYPES[dtype].bits)
    if absurd:
        return "shape-overflow", absurd
    bits = math.prod(shape) * DTYPES[dtype].bits
    if bits % 8:
        return "bad-shape", f"is {dtype} {shape}, which does not fill whole bytes"
    if offsets[1] - offsets[0] != bits // 8:
        return (
            "size-mismatch",
            f"is {dtype} {shape}, {bits // 8:,} bytes, but its offsets {offsets} span {offsets[1] - offsets[0]:,}",
        )
    return None


_HELP = {
    "unknown-dtype": "it was written by a newer safetensors, or is damaged; known are "
    + ", ".join(n for n, d in DTYPES.items() if d.safetensors),
    "overlap": "the file is damaged or made to deceive; get it again from its source",
    "hole": "the file is damaged or made to deceive; get it again from its source",
}


def _problems(rows: dict[str, Any], header: _Header) -> list[Diagnostic]:
    """Every way in which the rows fail to describe the file, one diagnostic a kind."""
    found: dict[str, list[tuple[str, str]]] = {}
    sound = []
    for name, row in rows.items():
        if not name or not is_text(name):
            found.setdefault("bad-name", []).append((name, "is an empty name or no text"))
        problem = _row_problem(row)
        if problem:
            found.setdefault(problem[0], []).append((name, problem[1]))
        else:
            sound.append((*row["data_offsets"], name))
    position, last = 0, ""
    for begin, end, name in sorted(sound) if len(sound) == len(rows) else []:
        if begin < position:
            found.setdefault("overlap", []).append(
                (name, f"starts at byte {begin:,}, within {last!r}, which ends at {position:,}")
            )
        elif begin > position:
            found.setdefault("hole", []).append(
                (name, f"starts at byte {begin:,}, but the bytes from {position:,} on belong to no tensor")
            )
        position, last = max(position, end), name
    diagnostics = [
        header.problem(code, f"tensor {hits[0][0]!r} {hits[0][1]}", _HELP.get(code), _more(hits))
        for code, hits in found.items()
    ]
    if not found and position > header.data_size:
        text = f"the tensors end at byte {position:,} of the data, the file at {header.data_size:,}"
        diagnostics.append(header.problem("truncated-file", text, "download or write the file again"))
    elif not found and position < header.data_size:
        text = f"{header.data_size - position:,} bytes at the end of the file belong to no tensor"
        diagnostics.append(
            header.problem("trailing-bytes", text, "the file is damaged, or two files run together; get it again")
        )
    return diagnostics


def _more(hits: list[tuple[str, str]]) -> tuple[str, ...]:
    lines = tuple(f"also {name!r} {text}" for name, text in hits[1:6])
    return lines if len(hits) <= 6 else (*lines, f"and {len(hits) - 6} more")
