"""How a tree of tensors is laid out in Flax's msgpack: the bytes before each tensor, and where they go.

The bytes are those that `flax.serialization.msgpack_serialize` writes, save for arrays of more than 2^30 bytes, which
it parts and this does not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import CheckpointError, Diagnostic
from ...specs import DTYPES, TensorSpec
from ..formats.format import Announced
from ..formats.recognising import is_msgpack_map
from .npz_writer import refuse_names, refuse_unheld

__all__ = ["laid_out"]

_MOST = (1 << 32) - (1 << 16)  # bytes of an extension, less those of its description
_ARRAY = 1
_EXACT = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}

Tree = dict[str, Any]


def laid_out(announced: Announced) -> tuple[bytes, dict[str, int], dict[int, bytes], int]:
    """Return the bytes before the first tensor, where each begins, the bytes before the others, and the file's size.

    Raises:
        CheckpointError: a dtype that numpy and JAX have not, more than 4 GiB in a tensor, a tied name, a name without
            a first part, or a key that is a tensor's and that of a level of the tree.
    """
    held = [name for name, dtype in DTYPES.items() if dtype.bits >= 8 and dtype.torch]
    odd = {key: spec for key, spec in announced.specs.items() if spec.dtype not in held or spec.nbytes > _MOST}
    refuse_unheld(announced.path, "msgpack", odd, dict.fromkeys(held), announced.aliases)
    refuse_names(announced.path, "msgpack", [key for key in announced.specs if key.startswith(".")])
    offsets: dict[str, int] = {}
    between: dict[int, bytes] = {}
    waiting, at, start = bytearray(), 0, 0
    for piece in _pieces(_tree(announced)):
        if isinstance(piece, bytes):
            waiting += piece
            continue
        between[start] = bytes(waiting)
        at += len(waiting)
        offsets[piece] = at
        at += announced.specs[piece].nbytes
        waiting, start = bytearray(), at
    head = between.pop(0, bytes(waiting))
    if announced.specs and not is_msgpack_map(head):  # a reader knows the format by its first key
        refuse_names(announced.path, "msgpack", [next(iter(announced.specs))])
    return head, offsets, between, max(at, len(head))


def _tree(announced: Announced) -> Tree:
    """The keys by the parts of their names, with the spec of each tensor at the end."""
    tree: Tree = {}
    for key, spec in announced.specs.items():
        *above, last = key.split(".")
        node: Any = tree
        for part in above:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            text = f"{key!r} cannot be written: another key is the beginning of it, or continues it"
            help = "a tree holds a tensor or more levels under a name: rename one of the two"
            raise CheckpointError(Diagnostic("tie-not-in-format", text, str(announced.path), help=help))
        node[last] = key, spec
    return tree


def _pieces(tree: Tree) -> Iterator[bytes | str]:
    """What is written in order: bytes, and the key of each tensor in the place of its own."""
    yield _sized(len(tree), (0x80, 16), {2: 0xDE, 4: 0xDF})
    for name, part in tree.items():
        yield _text(name)
        if isinstance(part, dict):
            yield from _pieces(part)
        else:
            key, spec = part
            yield _described(spec)
            yield key


def _described(spec: TensorSpec) -> bytes:
    """The bytes before those of an array."""
    name = DTYPES[spec.dtype].torch or ""
    inner = b"\x93" + _sized(len(spec.shape), (0x90, 16), {2: 0xDC, 4: 0xDD}) + b"".join(map(_number, spec.shape))
    inner += _text(name) + _sized(spec.nbytes, (0, 0), {1: 0xC4, 2: 0xC5, 4: 0xC6})
    nbytes = len(inner) + spec.nbytes
    if nbytes in _EXACT:
        return bytes((_EXACT[nbytes], _ARRAY)) + inner
    return _sized(nbytes, (0, 0), {1: 0xC7, 2: 0xC8, 4: 0xC9}) + bytes((_ARRAY,)) + inner


def _text(text: str) -> bytes:
    data = text.encode()
    return _sized(len(data), (0xA0, 32), {1: 0xD9, 2: 0xDA, 4: 0xDB}) + data


def _sized(count: int, short: tuple[int, int], marks: Mapping[int, int]) -> bytes:
    """The first bytes of a value of some length: in one byte below a limit, else behind a mark."""
    mark, limit = short
    if count < limit:
        return bytes((mark | count,))
    width = next(width for width in marks if count < 1 << 8 * width)
    return bytes((marks[width],)) + count.to_bytes(width, "big")


def _number(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    code, layout = next((code, layout) for code, layout, limit in _NUMBERS if value < limit)
    return bytes((code,)) + struct.pack(layout, value)


_NUMBERS = ((0xCC, ">B", 1 << 8), (0xCD, ">H", 1 << 16), (0xCE, ">I", 1 << 32), (0xCF, ">Q", 1 << 64))
