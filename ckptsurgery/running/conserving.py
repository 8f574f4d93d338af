"""That nothing was lost or doubled: a fingerprint of elements which does not ask for their order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..planning.costing import CHUNK
from ..planning.steps import Move, Parallel, Program
from ..specs import DTYPES, TensorSpec
from ..storage.checkpoint import Checkpoint

__all__ = ["conserves", "fingerprint_of", "total_of"]

_WORD = (1 << 64) - 1
_BLOCK = 1 << 14  # elements that a core's own cache holds
_HISTOGRAM = 2  # bytes of an element up to which counting each value is quicker than mixing each element


def fingerprint_of(data: bytes | bytearray | memoryview, width: int) -> int:
    """The sum over all elements of a 64-bit hash of each, so that order does not matter and repetition does.

    >>> a, b = fingerprint_of(b"one two ", 4), fingerprint_of(b"two one ", 4)
    >>> a == b, a == fingerprint_of(b"one one ", 4)
    (True, False)

    Chance makes two lists of elements alike once in 2^64; somebody who means to can.

    Args:
        width: bytes of an element: 1, 2, 4, 8 or 16.

    The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    import numpy as np

    if width <= _HISTOGRAM:
        counts = np.bincount(np.frombuffer(data, dtype=f"<u{width}"), minlength=1 << 8 * width).astype("u8")
        return int((_mixed(np.arange(len(counts), dtype="u8")) * counts).sum(dtype="u8"))
    words = np.frombuffer(data, dtype="<u8" if width == 16 else f"<u{width}")
    words = words.reshape(-1, 2) if width == 16 else words
    total = 0
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        mixed = _mixed(_mixed(block[:, 0]) ^ block[:, 1]) if width == 16 else _mixed(block)
        total += int(mixed.sum(dtype="u8"))
    return total & _WORD


def _mixed(words: Any) -> Any:
    import numpy as np

    z = words.astype("u8")
    z += np.uint64(0x9E3779B97F4A7C15)
    shifted = np.empty_like(z)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        np.right_shift(z, np.uint64(shift), out=shifted)
        z ^= shifted
        if factor > 1:
            z *= np.uint64(factor)
    return z


def total_of(checkpoint: Checkpoint, keys: Iterable[str]) -> int:
    """The fingerprint of all elements of some tensors, each read once from its start to its end."""
    total = 0
    for key in keys:
        spec = checkpoint.specs[key]
        for start in range(0, spec.nbytes, CHUNK):
            total += fingerprint_of(checkpoint.read(key, start, min(start + CHUNK, spec.nbytes)), width_of(spec))
    return total & _WORD


def width_of(spec: TensorSpec) -> int:
    """Bytes of an element; those that share a byte count by bytes."""
    return DTYPES[spec.dtype].itemsize if DTYPES[spec.dtype].bits % 8 == 0 else 1


def conserves(program: Program) -> bool:
    """Whether a program, by its own account, puts every element of its sources in exactly one place."""
    if program.moves is not None:
        return program.moves.invertible
    return all(
        i.layout.invertible if isinstance(i, Move) else isinstance(i, Parallel) and all(map(conserves, i.programs))
        for i in program.instructions
    )
