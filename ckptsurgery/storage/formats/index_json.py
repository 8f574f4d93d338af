"""The JSON of an index: which shard holds which key, read precisely, or proved to say what the shards say anyway.

An index of 100,000 keys is 10 MB of JSON, and mostly it repeats the headers of its shards. To write what it has to
say then, and to compare, takes a tenth of the time that reading it does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

from ...errors import CheckpointError, Diagnostic
from ...wording import shown_keys
from ..json_text import refuse_brackets
from ..sources.files import read_regular
from ..sources.system_errors import os_error
from .numbering import shard_names

__all__ = ["PlainIndex", "likely_shards", "read_index_text", "read_plain_index", "weight_map_in", "weight_map_of"]

_FIRST_ROW = re.compile(
    r'"weight_map"\s*:\s*\{\s*(?P<row>"[^"\\]*"(?P<colon>\s*:\s*)"(?P<file>[^"\\]+)"(?P<comma>\s*,\s*)?)'
)

_PLAIN = bytes({*range(0x20, 0x7F)} - {*b'"\\'})


class PlainIndex(NamedTuple):
    """An index that lists all that its shards hold, each key in its own.

    Args:
        by_name: whether the keys are sorted; else they follow each other as in the shards.
        about: its metadata.
    """

    by_name: bool
    about: dict[str, Any]


def read_index_text(path: str) -> str:
    """The text of an index.

    Raises:
        CheckpointError: no such file, or no text.
    """
    try:
        raw = read_regular(path)
        return raw.decode(json.detect_encoding(raw))
    except OSError as error:
        raise os_error(error, path) from error
    except ValueError as error:
        raise _no_json(error, path) from None


def likely_shards(text: str) -> list[str]:
    """The files that an index names if its first row tells of all: that file, and where it is numbered, its series.

    >>> likely_shards('{"weight_map": {"w": "model-00002-of-00002.safetensors"}}')
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    first = _FIRST_ROW.search(text)
    if first is None or _leaves_folder(first["file"]):
        return []
    return shard_names(first["file"]) or [first["file"]]


def read_plain_index(text: str, held: Mapping[str, Collection[str]]) -> PlainIndex | None:
    """The index of shards that hold these keys, by file; None where it may say anything else than that.

    >>> text = '{"metadata": {"by": "me"}, "weight_map": {"a": "1.st", "c": "1.st", "b": "2.st"}}'
    >>> read_plain_index(text, {"1.st": ["a", "c"], "2.st": ["b"]})
    PlainIndex(by_name=False, about={'by': 'me'})
    >>> read_plain_index(text, {"1.st": ["a", "c"], "2.st": ["b", "d"]}) is None
    True
    """
    first = _FIRST_ROW.search(text)
    count = sum(map(len, held.values()))
    if first is None or not all(held.values()) or len(set().union(*held.values())) < count:
        return None
    comma = first["comma"] or ""
    if not all(_is_plain("".join([file, *keys])) for file, keys in held.items()) or (not comma and count > 1):
        return None
    for by_name in (False, True):
        start = first.start("row")
        end = _end_of_rows(text, start, _runs_by_name(held) if by_name else held.items(), first["colon"], comma)
        if end is not None:
            # The rest is small enough to be read precisely; one row tells that those left out were the weight map's.
            return _with_rest(f'{text[:start]}"":""{text[end:]}', by_name)
    return None


def _is_plain(text: str) -> bool:
    """Whether it is ASCII that JSON writes as it is."""
    return text.isascii() and not text.encode().translate(None, _PLAIN)


def _runs_by_name(held: Mapping[str, Collection[str]]) -> Iterator[tuple[str, Iterable[str]]]:
    owners = {key: file for file, keys in held.items() for key in keys}
    return groupby(sorted(owners), owners.__getitem__)


def _end_of_rows(
    text: str, start: int, runs: Iterable[tuple[str, Iterable[str]]], colon: str, comma: str
) -> int | None:
    """Where the rows end that a weight map has for each file and the keys in it; None where it has others."""
    at = start
    for file, keys in runs:
        end = f'"{colon}"{file}"'
        rows = (comma if at > start else "") + '"' + f'{end}{comma}"'.join(keys) + end
        if not text.startswith(rows, at):
            return None
        at += len(rows)
    return at


def _with_rest(text: str, by_name: bool) -> PlainIndex | None:
    repeated: list[str] = []
    try:
        index = _parsed(text, repeated)
    except (ValueError, RecursionError):
        return None
    if repeated or not isinstance(index, dict) or index.get("weight_map") != {"": ""}:
        return None
    return PlainIndex(by_name, _about(index))


def _about(index: dict[str, Any]) -> dict[str, Any]:
    metadata = index.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _no_json(error: Exception, path: str) -> CheckpointError:
    return CheckpointError(
        Diagnostic("bad-index", f"the index is not valid JSON: {error}", path, help="download or write it again")
    )


def weight_map_of(path: str) -> tuple[dict[str, str], dict[str, Any]]:
    """An index's `weight_map`, checked to stay in its folder, and its metadata.

    Raises:
        CheckpointError: no such file, no JSON, a key given twice, or a file name that leaves the folder.
    """
    return weight_map_in(read_index_text(path), path)


def weight_map_in(text: str, path: str) -> tuple[dict[str, str], dict[str, Any]]:
    """`weight_map_of` of an index whose text is read already."""
    repeated: list[str] = []
    try:
        index = _parsed(text, repeated)
    except (ValueError, RecursionError) as error:
        raise _no_json(error, path) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not set(map(type, weight_map.values())) <= {str}:
        raise CheckpointError(
            Diagnostic(
                "bad-index", "the index has no weight_map of keys to file names", path, help="is it an index at all?"
            )
        )
    if repeated:
        raise CheckpointError(
            Diagnostic(
                "duplicate-key",
                "the index names a key twice",
                path,
                notes=shown_keys(repeated),
                help="name each key once",
            )
        )
    outside = [name for name in dict.fromkeys(weight_map.values()) if _leaves_folder(name)]
    if outside:
        raise CheckpointError(
            Diagnostic(
                "unsafe-index",
                f"the index names a file outside its own folder: {outside[0]!r}",
                path,
                notes=shown_keys(outside[1:]),
                help="shards lie beside their index; do not trust this one",
            )
        )
    names = {name: name for name in weight_map.values()}
    one_each = dict(zip(weight_map, map(names.get, weight_map.values())))  # the parser makes a name for every key
    return one_each, _about(index)


def _leaves_folder(name: str) -> bool:
    # Judged by the name alone: the hub's cache is made of links that point elsewhere, and they are fine.
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return True
    parts = re.split(r"[/\\]", name)
    return (
        not name
        or "\0" in name
        or ".." in parts
        or parts[0] == ""
        or parts[-1] in ("", ".")
        or bool(re.match(r"[A-Za-z]:", name))
    )


_SPACED = re.compile(r'"\s+:')


def _parsed(text: str, repeated: list[str]) -> Any:
    """JSON, and the keys that one object in it gives twice."""
    refuse_brackets(text)
    if "\\" not in text:
        # Where nothing is escaped, there are no fewer objects' keys than places that look like one: if all of them are
        # in the result, none was given twice, and the pairs need not lie in memory beside it.
        found = json.loads(text)
        if not _SPACED.search(text) and _members(found) == text.count('":'):
            return found

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            repeated.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return found

    return json.loads(text, object_pairs_hook=collect)


def _members(value: Any) -> int:
    """Keys of all objects in a JSON value."""
    if isinstance(value, dict):
        inner = value.values() if set(map(type, value.values())) - {str} else ()
        return len(value) + sum(map(_members, inner))
    return sum(map(_members, value)) if isinstance(value, list) else 0
