"""What the opcodes of a pickle work on: a file, a stack, a memo, and the credit that everything made is paid from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, BinaryIO

from ...errors import CheckpointError, Diagnostic
from .inert import Blob, FileBytes, NumpyType, Opaque

__all__ = ["PickleStack"]

_LARGE = 4096  # bytes; a longer byte string stays in the file
_LINE = 4096  # the longest text argument of an opcode that is read (module names, numbers)
_EMPTY = {}.__sizeof__()
_SIMPLE = frozenset({str, int, float, bool, complex, bytes, type(None)})


class PickleStack(ABC):
    """The state of a machine that reads a pickle; what a call or a state means is left to a machine that knows.

    Args:
        file: a seekable binary file.
        end: position in `file` that the pickle may not pass.
        source: the file's name in errors.
        persistent: what a persistent id stands for; without it a pickle that has some is refused.
        base: added to the positions in `Blob`s, when `file` is a part of a larger one.
        nested: what a torch file in a byte string of the pickle holds; without it such strings stay opaque.
        credit: bytes of objects that may be made.
    """

    def __init__(
        self,
        file: BinaryIO,
        end: int,
        source: str,
        persistent: Callable[[Any], Any] | None,
        base: int,
        nested: Callable[[FileBytes | Blob], Any] | None,
        credit: int,
    ) -> None:
        self.file = file
        self.read: Callable[[int], bytes] = file.read
        self.end = end
        self.source = source
        self.persistent = persistent
        self.base = base
        self.nested = nested
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: list[Any] = []
        self.far: dict[int, Any] = {}
        self.credit = credit
        self.depth = 0  # of pickles around this one

    @abstractmethod
    def call(self, function: Any, args: Any) -> Any:
        """Return what calling `function` means."""

    @abstractmethod
    def build(self, target: Any, state: Any) -> None:
        """Give `target` its state, as `__setstate__` would."""

    def spend(self, count: int) -> None:
        """Pays for memory, in bytes; a pickle that copies one list over and over, or is all empty sets, runs out."""
        self.credit -= count
        if self.credit < 8 * len(self.stack):
            raise CheckpointError(
                Diagnostic(
                    "damaged-pickle",
                    f"the pickle in {self.source!r} cannot be read: it blows up out of proportion",
                    place=self.source,
                    help="if it is sound, it is made of very many small objects: save the tensors alone, by torch.save",
                )
            )

    def take(self, count: int) -> bytes:
        """Exactly the next `count` bytes."""
        # checked first, since reading allocates what it is asked for
        if count > _LARGE and count > self.end - self.file.tell():
            raise EOFError(count)
        data = self.read(count)
        if len(data) != count:
            raise EOFError
        return data

    def blob(self, count: int) -> bytes | Blob:
        """The next `count` bytes, or where they lie when they are many."""
        at = self.file.tell()
        if count <= _LARGE:
            data = FileBytes(self.take(count))
            data.at = at + self.base
            self.credit -= 280 + count  # an object with a dictionary
            return data
        if count > self.end - at:
            raise EOFError
        self.file.seek(count, 1)
        self.credit -= 160
        return Blob(at + self.base, count, self.source)

    def line(self) -> bytes:
        """The text up to the next newline, without it."""
        text = self.file.readline(_LINE)
        if not text.endswith(b"\n"):
            raise EOFError
        return text[:-1]

    def mark(self) -> list[Any]:
        """What was pushed since the last mark, which is taken away."""
        items = self.stack
        self.stack = stack = self.outer.pop()
        self.credit += 72 + 8 * len(stack)
        return items

    def key(self, key: Any) -> Any:
        """`key`, if it is quick to hash: hashing a deep tuple takes exponential time."""
        kind = type(key)
        if kind is str or kind is int:
            return key
        if kind is bytes or kind is FileBytes:
            # Python 2 strings that are not ASCII
            self.spend(64 + 4 * len(key))
            return key.decode("utf-8", "replace")
        if kind is tuple:
            self.spend(8 * len(key))
            for item in key:
                if type(item) is tuple and not all(type(i) in _SIMPLE for i in item):
                    raise ValueError("a key nested too deep")
                self.key(item)
            return key
        if kind in _SIMPLE or kind is Opaque or kind is frozenset or kind is NumpyType:
            return key
        raise ValueError("not a key")

    def extend(self, target: Any, items: list[Any]) -> None:
        """Appends to a list, or notes on an inert object that it was appended to."""
        self.credit -= 8 * len(items)
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            self.spend(104 * len(items))
            target.update(self.key(item) for item in items)
        elif type(target) is Opaque:
            if target.items is None:
                target.items = []
            target.items.extend(items)
        else:
            raise ValueError("items for no list")

    def update(self, target: Any, items: list[Any]) -> None:
        """Sets the items of a mapping, or notes on an inert object that they were set."""
        if type(target) is Opaque:
            if target.pairs is None:
                target.pairs = {}
            target = target.pairs
        elif not isinstance(target, dict):
            raise ValueError("items for no mapping")
        if len(items) % 2:
            raise ValueError("a key without a value")
        before = target.__sizeof__() if target else _EMPTY
        rest = iter(items)
        for key, value in zip(rest, rest):
            target[key if type(key) is str else self.key(key)] = value
        # Charged by its real growth: a fixed price per item is twice what the many small dictionaries take.
        self.credit -= target.__sizeof__() - before
