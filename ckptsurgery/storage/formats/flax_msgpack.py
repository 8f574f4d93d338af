"""Flax's files: one tree in msgpack, whose arrays are read where they are stored.

Source: `flax.serialization` (`msgpack_serialize`, `to_bytes`), version 0.12.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ...specs import DTYPES, TensorSpec, shape_problem
from ..contents import Contents, Entry
from ..sources.byte_source import ByteSource, read_run
from ..subtree import enter
from ..unpickling.inert import Tensor
from ..unpickling.nesting import flatten, settle
from ..unpickling.unreadable import told_apart
from .built import built
from .cursor import Damaged, HeaderCursor, reading
from .format import Announced, Format, OpenedSource
from .msgpack_tree import ChunkedStorage, TreeReader
from .recognising import is_msgpack_map
from .storages import StorageRun, place_tensor
from .zip_archive import refused

if TYPE_CHECKING:
    from ..output.staging import Writer

__all__ = ["FlaxFormat"]

_OPTIMIZER = "opt_state"


class FlaxFormat(Format):
    """A tree of arrays as `flax.serialization` writes it."""

    name = "msgpack"
    text = "a msgpack file (Flax)"
    suffixes = (".msgpack",)
    writes = (".msgpack",)

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether a mapping begins, whose first key is a text."""
        return is_msgpack_map(head)

    def read(self, opened: OpenedSource) -> Contents:
        """Return the arrays of the tree under dotted paths; `opt_state` of a training state is among the extras.

        Raises:
            CheckpointError: damaged, or without arrays.
        """
        return self.read_below(opened, None)

    def read_below(self, opened: OpenedSource, subtree: str | None) -> Contents:
        """Return the arrays below a dotted path."""
        with reading(opened.name):
            cursor = HeaderCursor(opened)
            tree = TreeReader(cursor, opened.name).value()
            if cursor.left:
                raise Damaged(f"it goes on for {cursor.left:,} bytes behind its tree")
            apart = {}
            if subtree is None and isinstance(tree, dict) and _OPTIMIZER in tree and len(tree) > 1:
                apart = {_OPTIMIZER: tree.pop(_OPTIMIZER)}
            leaves, rest = flatten(tree, opened.name)
            if not leaves:
                raise refused(opened.name, "no-tensors", "holds no arrays", "name another file")
            leaves, rest = told_apart(leaves, rest, opened.name)
            entries = {key: _entry(key, leaf, opened) for key, leaf in leaves.items()}
            extras = settle(rest | apart, lambda leaf: _entry("an array beside the model", leaf, opened))
        contents = Contents(entries, extras=extras)
        return enter(contents, subtree, opened.name) if subtree else contents

    def writer(self, announced: Announced) -> Writer:
        """Return a writer; dots in keys become levels of the tree."""
        from ..output.msgpack_layout import laid_out

        head, offsets, between, size = laid_out(announced)
        made = announced.in_one_file(head, offsets, size, between)
        made.left_out = list(announced.extras)
        return made


def _entry(key: str, leaf: Any, opened: OpenedSource) -> Entry:
    if type(leaf) is not Tensor:
        raise Damaged(f"{key!r} cannot be read: {leaf!r}")
    if type(leaf.storage) is ChunkedStorage:
        absurd = shape_problem(leaf.shape, DTYPES[leaf.dtype].bits)
        spec = TensorSpec(() if absurd else leaf.shape, leaf.dtype)
        if absurd or leaf.storage.numel != spec.nbytes:
            raise Damaged(f"the chunks of {key!r} do not add up to its shape")
        return built(spec, key, opened.source, partial(_joined, runs=leaf.storage.runs))
    start, nbytes = leaf.storage.place or (0, 0)
    try:
        entry = place_tensor(leaf, StorageRun(opened.name, start, nbytes))
    except ValueError as error:
        raise Damaged(f"{key!r} cannot be read: {error}") from None
    if entry.spec.nbytes != nbytes:
        raise Damaged(f"{key!r} is {entry.spec} of {entry.spec.nbytes:,} bytes, and {nbytes:,} are there")
    return entry


def _joined(source: ByteSource, runs: Sequence[tuple[int, int]]) -> bytearray:
    return bytearray().join(read_run(source, *run) for run in runs)
