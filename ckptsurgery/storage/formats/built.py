"""Tensors whose bytes are not stored as they are: unpacked, decoded or put together when they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError, Diagnostic
from ...specs import TensorSpec
from ..contents import Entry
from ..sources.byte_source import ByteSource

__all__ = ["DerivedTensor", "built"]

_FREE = 1 << 26
_TIMES = 1100  # bytes that deflate makes of one, and some more


@dataclass(frozen=True, slots=True)
class DerivedTensor:
    """A tensor that is made when it is called.

    Args:
        spec: its shape and dtype.
        name: what errors call it.
        source: the bytes that it is made of.
        make: gives the tensor's elements, C-contiguous and little-endian.
    """

    spec: TensorSpec
    name: str
    source: ByteSource
    make: Callable[[ByteSource], bytes | bytearray]

    def __call__(self) -> Any:
        from ..tensors import tensor_from

        if self.spec.nbytes > max(_FREE, _TIMES * self.source.size):
            raise self._damaged(f"{self.spec} is larger than its file can unpack to")
        try:
            made = self.make(self.source)
        except CheckpointError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self._damaged(str(error)[:200]) from None
        if len(made) != self.spec.nbytes:
            raise self._damaged(f"{self.spec} needs {self.spec.nbytes:,} bytes, the file holds {len(made):,}")
        return tensor_from(bytearray(made) if isinstance(made, bytes) else made, 0, self.spec, self.name)

    def _damaged(self, why: str) -> CheckpointError:
        text = f"{self.name!r} cannot be read: {why}"
        help = "the file is damaged: copy or download it again"
        return CheckpointError(Diagnostic("damaged-tensor", text, self.source.name, help=help))


def built(spec: TensorSpec, name: str, source: ByteSource, make: Callable[[ByteSource], bytes | bytearray]) -> Entry:
    """Return the entry of a tensor that is made when it is loaded."""
    return Entry(spec, tensor=DerivedTensor(spec, name, source, make))
