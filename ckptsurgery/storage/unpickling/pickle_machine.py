"""A pickle machine that executes nothing: globals stay names, calls are looked up in a short list of inert meanings.

Python's own unpickler calls what a file names, and in C it also allocates what a file announces (one opcode can
ask for a memo of 2**32 slots). This one is a small machine of its own. A global becomes an `Opaque` record of its
name, a call of it is looked up in `pickle_calls.CALLS` (tensors, storages, ordered dicts, numpy arrays, a few plain
values), and any other call is recorded on the `Opaque` and has no effect. Long byte strings are left where they lie
and become `Blob`s. Time and memory are linear in the size of the file: what is made is paid for, from a credit of some
bytes for each byte of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from ...errors import CheckpointError
from .frequent_opcodes import LONGEST, run_frequent
from .inert import Array, Blob, Fields, FileBytes, NumpyType, Opaque, Ordered, Tensor
from .joblib_arrays import set_joblib_state
from .pickle_calls import CALLS, set_array_state, set_type_state
from .pickle_opcodes import OPCODES, Stop, damaged, trailing
from .pickle_stack import PickleStack

__all__ = ["FREE", "TIMES", "Unpickler", "damaged", "trailing"]

FREE = 32 << 20
"""Bytes of objects that any pickle may make."""

TIMES = 20
"""Bytes of objects that a pickle may make beyond that for each byte of its file.

The densest honest one known, the `.metadata` of `torch.distributed.checkpoint`, is charged up to 13 and takes 10.
"""

_DEPTH = 8  # of pickles within pickles
_AHEAD = 64 << 10  # bytes: the size of a frame in protocol 4
_ONE, _FEW = range(1), range(64)  # opcodes that are left to the table: one, and more where no frequent one was met
_FAILURES = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class Unpickler(PickleStack):
    """Reads one pickle from a file's current position and leaves the file right behind it.

    >>> import io, os, pickle
    >>> class Evil:
    ...     def __reduce__(self): return os.system, ("echo pwned",)
    >>> data = pickle.dumps({"epoch": 3, "evil": Evil()})
    >>> tree = Unpickler(io.BytesIO(data), len(data), "evil.pt").load()
    >>> tree["epoch"], tree["evil"].name, tree["evil"].args
    (3, 'system', ('echo pwned',))

    Args:
        file: a seekable binary file.
        end: position in `file` that the pickle may not pass.
        source: the file's name in errors.
        persistent: what a persistent id stands for; without it a pickle that has some is refused.
        base: added to the positions in `Blob`s, when `file` is a part of a larger one.
        nested: what a torch file in a byte string of the pickle holds; without it such strings stay opaque.
        size: bytes of the file that the pickle is a part of, which its memory is measured against; `end` by default.

    Raises:
        CheckpointError: truncated, damaged or hostile input; never another exception.
    """

    def __init__(
        self,
        file: BinaryIO,
        end: int,
        source: str,
        persistent: Callable[[Any], Any] | None = None,
        base: int = 0,
        nested: Callable[[FileBytes | Blob], Any] | None = None,
        size: int | None = None,
    ) -> None:
        credit = FREE + TIMES * max(0, end if size is None else size)
        super().__init__(file, end, source, persistent, base, nested, credit)

    def load(self) -> Any:
        """The pickle's value, of plain Python values and the records in `inert`."""
        try:
            while True:
                self._run()
        except Stop:
            pass
        except CheckpointError:
            raise
        except _FAILURES:
            at = self.file.tell()
            why = "it ends too early" if at >= self.end else f"it makes no sense at byte {at + self.base}"
            raise damaged(self.source, why) from None
        except OSError as error:
            raise damaged(self.source, error.strerror or "the file cannot be read") from None
        if self.file.tell() > self.end or len(self.stack) != 1 or self.outer:
            raise damaged(self.source, "its end does not fit its beginning")
        return self.stack[0]

    def _run(self) -> None:
        """Carry out the opcodes of some bytes that are read ahead."""
        file, read, opcodes = self.file, self.read, OPCODES
        start = file.tell()
        data, at = read(min(_AHEAD, max(0, self.end - start))), 0
        while at >= 0:
            before, at = at, run_frequent(self, data, start, at)
            self.spend(0)
            for _ in _FEW if at == before else _ONE:
                opcodes[read(1)](self)
            at = file.tell() - start
            if at > len(data) - LONGEST:
                break

    def call(self, function: Any, args: Any) -> Any:
        """What calling `function` means: a value of the allow-list, else a record that has no effect."""
        if type(function) is not Opaque:
            self.credit -= 320
            return Opaque("", type(function).__name__, args)
        if function.args is None and type(args) is tuple:
            meaning = CALLS.get(function.path)
            if meaning is not None:
                self.credit -= 160
                try:
                    value = meaning(self, args)
                except _MISFITS:
                    value = None
                if value is not None:
                    if args and value is args[0]:
                        self.credit += 160  # a `torch.Size` of a tuple is that tuple: nothing was made
                    return value
        self.credit -= 128
        return Opaque(function.module, function.name, args, None, function.path)

    def build(self, target: Any, state: Any) -> None:
        """Gives `target` its state, as `__setstate__` would."""
        kind = type(target)
        if kind is Opaque:
            target.state = state
        elif kind is Ordered and type(state) is dict:
            self.spend(104 * len(state))
            target.attributes.update(state)
        elif kind is Fields and isinstance(state, dict):
            self.spend(104 * len(state))
            target.update(state)
        elif kind is Array:
            if type(state) is dict:
                set_joblib_state(self, target, state, self._inner)
            else:
                set_array_state(self, target, state)
        elif kind is NumpyType:
            set_type_state(target, state)
        elif kind is not Tensor and kind is not Ordered:
            raise ValueError("state for a plain value")

    def _inner(self) -> Any:
        """A pickle that stands in this one between two opcodes; it is paid for from the same credit."""
        if self.depth >= _DEPTH:
            raise ValueError("pickles within pickles")
        inner = Unpickler(self.file, self.end, self.source, self.persistent, self.base)
        inner.depth, inner.credit = self.depth + 1, self.credit
        try:
            return inner.load()
        finally:
            self.credit = inner.credit


_MISFITS = (AttributeError, LookupError, OverflowError, TypeError, ValueError, struct.error)
