"""What headers alone show: dtypes that do not fit together, a padded vocabulary, things a pickle would run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import Diagnostic
from ..specs import DTYPES
from ..storage.checkpoint import Checkpoint
from ..storage.unpickling.inert import Opaque
from ..storage.unpickling.pickle_calls import POWERFUL
from ..storage.unpickling.unreadable import unreadable_tensors
from ..wording import counted
from .conversions import conversion
from .file_checks import shown

__all__ = ["header_findings"]

_DEPTH = 6
_PADDING = 1024


def header_findings(checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """Findings from names, shapes, dtypes, metadata and what is no tensor."""
    if checkpoint.unreadable:
        yield unreadable_tensors(checkpoint.unreadable, place=checkpoint.source)
    yield from _empty(checkpoint)
    yield from _dtypes(checkpoint)
    yield from _vocabulary(checkpoint)
    yield from _calls(checkpoint)


def _empty(checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    empty = [key for key, spec in checkpoint.specs.items() if spec.numel == 0]
    if empty:
        yield Diagnostic(
            "empty-tensors",
            f"{counted(len(empty), 'tensor', 'has')} no elements",
            checkpoint.source,
            shown(empty),
            help="were they gathered on another rank? sharded training leaves such stubs",
            severity="note",
        )


def _dtypes(checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    floats = {dtype for dtype in {spec.dtype for spec in checkpoint.specs.values()} if DTYPES[dtype].kind == "float"}
    if len(floats) < 2:
        return
    kinds: dict[str, list[str]] = {}
    for key, spec in checkpoint.specs.items():
        if spec.dtype in floats:
            kinds.setdefault(spec.dtype, []).append(key)
    usual = max(kinds, key=lambda dtype: sum(checkpoint.specs[key].nbytes for key in kinds[dtype]))
    others = [(dtype, keys) for dtype, keys in kinds.items() if dtype != usual]
    notes = tuple(f"{dtype}: {line}" for dtype, keys in others for line in shown(keys, 4))
    yield Diagnostic(
        "dtype-mix",
        f"most is {usual}, but " + " and ".join(f"{counted(len(k), 'tensor', 'is')} {dtype}" for dtype, k in others),
        checkpoint.source,
        notes,
        remedies=(conversion("casts all, if that is not meant", dtype=usual.lower()),),
        severity="note",
    )


def _vocabulary(checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    size = _vocabulary_size(checkpoint.config)
    if size is None:
        return
    padded = {
        key: spec.shape[0]
        for key, spec in checkpoint.specs.items()
        if len(spec.shape) == 2 and size < spec.shape[0] <= size + _PADDING and spec.shape[0] % 8 == 0
    }
    if padded:
        rows = ", ".join(map(str, sorted(set(padded.values()))))
        yield Diagnostic(
            "padded-vocabulary",
            f"the config has {size} words, but {counted(len(padded), 'tensor', 'has')} {rows} rows",
            checkpoint.source,
            shown(list(padded)),
            help="the rows behind the vocabulary are padding; a target without it needs them cut off",
            severity="note",
        )


def _vocabulary_size(config: Mapping[str, Any] | None) -> int | None:
    if config is None:
        return None
    size = config.get("vocab_size")
    for inner in config.values():
        if size is None and isinstance(inner, Mapping):
            size = inner.get("vocab_size")
    return size if type(size) is int and size > 1 else None


def _calls(checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    found: dict[str, str] = {}
    seen: set[int] = set()
    for path, value in checkpoint.extras.items():
        for opaque in _opaque(value, _DEPTH, seen):
            found.setdefault(opaque.path, path)
    unsafe = {name: path for name, path in found.items() if name.rpartition(".")[0] in POWERFUL}
    if unsafe:
        yield Diagnostic(
            "unsafe-pickle",
            f"loading it elsewhere would run {', '.join(unsafe)}",
            checkpoint.source,
            tuple(f"{name}, at {path!r}" for name, path in list(unsafe.items())[:8]),
            help="do not load it with anything else; convert keeps the tensors alone",
        )
    others = {name: path for name, path in found.items() if name not in unsafe}
    if others:
        yield Diagnostic(
            "pickled-objects",
            f"beside the tensors it holds {counted(len(others), 'kind')} of objects, which are not made here",
            checkpoint.source,
            tuple(f"{name}, at {path!r}" for name, path in list(others.items())[:8]),
            help="torch.load(weights_only=True) refuses such a file; convert leaves them out",
            severity="note",
        )


def _opaque(value: Any, depth: int, seen: set[int]) -> Iterator[Opaque]:
    if id(value) in seen:
        return  # a graph of shared lists has exponentially many paths
    if type(value) is Opaque:
        if value.note is None:
            yield value
        parts: Any = [value.args, value.state, value.pairs]
    else:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if depth > 0 and parts:
        seen.add(id(value))
        for part in list(parts)[:1000]:
            yield from _opaque(part, depth - 1, seen)
