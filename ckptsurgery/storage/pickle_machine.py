"""A pickle machine that executes nothing: globals stay names, calls are looked up in a short list of inert meanings.

Python's own unpickler calls what a file names, and in C it also allocates what a file announces (one opcode can
ask for a memo of 2**32 slots). This one is a small machine of its own. A global becomes an `Opaque` record of its
name, a call of it is looked up in `pickle_calls.CALLS` (tensors, storages, ordered dicts, numpy arrays, a few plain
values), and any other call is recorded on the `Opaque` and has no effect. Long byte strings are left where they lie
and become `Blob`s. Time and memory are linear in the size of the pickle.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from ..errors import CheckpointError, Diagnostic
from .inert import Array, Blob, Fields, FileBytes, NumpyType, Opaque, Ordered, Tensor
from .pickle_calls import CALLS, set_array_state, set_type_state

__all__ = ["Unpickler", "damaged"]

_LARGE = 4096  # bytes; a longer byte string stays in the file
_LINE = 4096  # the longest text argument of an opcode that is read (module names, numbers)
_MAX_PROTOCOL = 5
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


def damaged(source: str, why: str) -> CheckpointError:
    """The error for a pickle that ends early or makes no sense."""
    return CheckpointError(
        Diagnostic("damaged-pickle", f"the pickle in {source!r} cannot be read: {why}", place=source,
                   help="the file is truncated or damaged, or no checkpoint: copy or download it again")
    )  # fmt: skip


class _Stop(Exception):
    """The pickle's end; not an error."""


class Unpickler:
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
    ) -> None:
        self.file = file
        self.read = file.read
        self.end = end
        self.source = source
        self.persistent = persistent
        self.base = base
        self.nested = nested
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._credit = (1 << 24) + 4 * max(0, end)

    def load(self) -> Any:
        """The pickle's value, of plain Python values and the records in `inert`."""
        read, opcodes = self.read, _OPCODES
        try:
            while True:
                opcodes[read(1)](self)
        except _Stop:
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

    def spend(self, count: int) -> None:
        """Pays for `count` copied elements; a pickle that copies one list over and over runs out."""
        self._credit -= count
        if self._credit < 0:
            raise damaged(self.source, "it blows up out of proportion")

    def take(self, count: int) -> bytes:
        """Exactly the next `count` bytes."""
        # checked first: reading allocates what it is asked for
        if count > _LARGE and count > self.end - self.file.tell():
            raise EOFError
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
            return data
        if count > self.end - at:
            raise EOFError
        self.file.seek(count, 1)
        return Blob(at + self.base, count)

    def line(self) -> bytes:
        """The text up to the next newline, without it."""
        text = self.file.readline(_LINE)
        if not text.endswith(b"\n"):
            raise EOFError
        return text[:-1]

    def mark(self) -> list[Any]:
        """What was pushed since the last mark, which is taken away."""
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def key(self, key: Any) -> Any:
        """`key`, if it is quick to hash: hashing a deep tuple takes exponential time."""
        kind = type(key)
        if kind is str or kind is int:
            return key
        if kind is bytes or kind is FileBytes:
            # Python 2 strings that are not ASCII
            return key.decode("utf-8", "replace")
        if kind is tuple:
            self.spend(len(key))
            for item in key:
                if type(item) is tuple and not all(type(i) in _SIMPLE for i in item):
                    raise ValueError("a key nested too deep")
                self.key(item)
            return key
        if kind in _SIMPLE or kind is Opaque or kind is frozenset or kind is NumpyType:
            return key
        raise ValueError("not a key")

    def call(self, function: Any, args: Any) -> Any:
        """What calling `function` means: a value of the allow-list, else a record that has no effect."""
        if type(function) is not Opaque:
            return Opaque("", type(function).__name__, args)
        if function.args is None and type(args) is tuple:
            meaning = CALLS.get(function.path)
            if meaning is not None:
                try:
                    value = meaning(self, args)
                except _MISFITS:
                    value = None
                if value is not None:
                    return value
        return Opaque(function.module, function.name, args)

    def build(self, target: Any, state: Any) -> None:
        """Gives `target` its state, as `__setstate__` would."""
        kind = type(target)
        if kind is Opaque:
            target.state = state
        elif kind is Ordered and type(state) is dict:
            target.attributes.update(state)
        elif kind is Fields and isinstance(state, dict):
            self.spend(len(state))
            target.update(state)
        elif kind is Array:
            set_array_state(self, target, state)
        elif kind is NumpyType:
            set_type_state(target, state)
        elif kind is not Tensor and kind is not Ordered:
            raise ValueError("state for a plain value")

    def extend(self, target: Any, items: list[Any]) -> None:
        """Appends to a list, or notes on an inert object that it was appended to."""
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
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
        for i in range(0, len(items), 2):
            key = items[i]
            target[key if type(key) is str else self.key(key)] = items[i + 1]


_MISFITS = (AttributeError, LookupError, OverflowError, TypeError, ValueError, struct.error)
_SIMPLE = frozenset({str, int, float, bool, complex, bytes, type(None)})


def _unpack(layout: str) -> Callable[[Unpickler], Any]:
    read = struct.Struct(layout)
    size, unpack = read.size, read.unpack

    def value(vm: Unpickler) -> Any:
        return unpack(vm.take(size))[0]

    return value


_u1, _u2, _u4, _u8 = _unpack("<B"), _unpack("<H"), _unpack("<I"), _unpack("<Q")
_i4, _f8 = _unpack("<i"), _unpack(">d")


def _push(value: Callable[[Unpickler], Any]) -> Callable[[Unpickler], None]:
    def handler(vm: Unpickler) -> None:
        vm.stack.append(value(vm))

    return handler


def _proto(vm: Unpickler) -> None:
    if vm.take(1)[0] > _MAX_PROTOCOL:
        raise ValueError("unknown protocol")


def _stop(vm: Unpickler) -> None:
    raise _Stop


def _mark(vm: Unpickler) -> None:
    vm.outer.append(vm.stack)
    vm.stack = []


def _pop(vm: Unpickler) -> None:
    if vm.stack:
        vm.stack.pop()
    else:
        vm.mark()


def _pop_mark(vm: Unpickler) -> None:
    vm.mark()


def _frame(vm: Unpickler) -> None:
    vm.take(8)  # frames only help streaming


def _int(vm: Unpickler) -> Any:
    text = vm.line()
    return {b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text)


def _long(size: Callable[[Unpickler], int]) -> Callable[[Unpickler], int]:
    return lambda vm: int.from_bytes(vm.take(size(vm)), "little", signed=True)


def _string(vm: Unpickler) -> Any:
    text = vm.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in b"\"'":
        raise ValueError("not a string")
    return _old_string(codecs.escape_decode(text[1:-1])[0])


def _old_string(data: bytes | Blob) -> Any:
    # a Python 2 str is text or bytes, nobody knows; ASCII is both
    return data.decode("ascii") if isinstance(data, bytes) and data.isascii() else data


def _signed(vm: Unpickler) -> int:
    size = int(_i4(vm))
    if size < 0:
        raise ValueError("negative size")
    return size


def _unicode(vm: Unpickler) -> None:
    # the most frequent opcode of a state_dict: written out
    size = int.from_bytes(vm.read(4), "little")
    vm.stack.append(vm.take(size).decode("utf-8", "surrogatepass"))


def _memoize(vm: Unpickler) -> None:
    vm.memo[len(vm.memo)] = vm.stack[-1]


def _binput(vm: Unpickler) -> None:
    vm.memo[vm.read(1)[0]] = vm.stack[-1]


def _long_binput(vm: Unpickler) -> None:
    vm.memo[int.from_bytes(vm.take(4), "little")] = vm.stack[-1]


def _put(vm: Unpickler) -> None:
    vm.memo[int(vm.line())] = vm.stack[-1]


def _binget(vm: Unpickler) -> None:
    vm.stack.append(vm.memo[vm.read(1)[0]])


def _tuple(vm: Unpickler) -> None:
    items = tuple(vm.stack)
    vm.stack = vm.outer.pop()
    vm.stack.append(items)


def _tuple_of(count: int) -> Callable[[Unpickler], None]:
    def handler(vm: Unpickler) -> None:
        stack = vm.stack
        if len(stack) < count:
            raise IndexError
        stack[-count:] = (tuple(stack[-count:]),)

    return handler


def _dict(vm: Unpickler) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    vm.update(made, vm.mark())
    return made


def _setitem(vm: Unpickler) -> None:
    value, key = vm.stack.pop(), vm.stack.pop()
    vm.update(vm.stack[-1], [key, value])


def _setitems(vm: Unpickler) -> None:
    items = vm.mark()
    vm.update(vm.stack[-1], items)


def _append(vm: Unpickler) -> None:
    item = vm.stack.pop()
    vm.extend(vm.stack[-1], [item])


def _appends(vm: Unpickler) -> None:
    items = vm.mark()
    vm.extend(vm.stack[-1], items)


def _frozenset(vm: Unpickler) -> frozenset[Any]:
    return frozenset([vm.key(item) for item in vm.mark()])


def _global(vm: Unpickler) -> Opaque:
    return Opaque(vm.line().decode(), vm.line().decode())


def _stack_global(vm: Unpickler) -> None:
    name, module = vm.stack.pop(), vm.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise ValueError("not a name")
    vm.stack.append(Opaque(module, name))


def _extension(size: Callable[[Unpickler], int]) -> Callable[[Unpickler], Opaque]:
    # the registry behind these numbers lives in the process that wrote the file
    return lambda vm: Opaque("copyreg", f"extension_{size(vm)}")


def _reduce(vm: Unpickler) -> None:
    args = vm.stack.pop()
    vm.stack[-1] = vm.call(vm.stack[-1], args)


def _newobj_ex(vm: Unpickler) -> None:
    named, args = vm.stack.pop(), vm.stack.pop()
    if named:
        made = vm.stack[-1]
        vm.stack[-1] = Opaque(getattr(made, "module", ""), getattr(made, "name", ""), (args, named))
    else:
        vm.stack[-1] = vm.call(vm.stack[-1], args)


def _inst(vm: Unpickler) -> Any:
    made = _global(vm)
    return vm.call(made, tuple(vm.mark()))


def _obj(vm: Unpickler) -> Any:
    made, *args = vm.mark()
    return vm.call(made, tuple(args))


def _build(vm: Unpickler) -> None:
    state = vm.stack.pop()
    vm.build(vm.stack[-1], state)


def _persistent(vm: Unpickler) -> None:
    vm.stack[-1] = _stands_for(vm, vm.stack[-1])


def _stands_for(vm: Unpickler, identity: Any) -> Any:
    if vm.persistent is None:
        raise damaged(vm.source, "it refers to things outside of it (persistent ids)")
    return vm.persistent(identity)


def _outside(vm: Unpickler) -> None:
    raise damaged(vm.source, "it keeps its buffers outside (protocol 5, out of band)")


_OPCODES: dict[bytes, Callable[[Unpickler], None]] = {
    b"\x80": _proto,
    b"\x95": _frame,
    b".": _stop,
    b"(": _mark,
    b"0": _pop,
    b"1": _pop_mark,
    b"2": lambda vm: vm.stack.append(vm.stack[-1]),
    b"N": lambda vm: vm.stack.append(None),
    b"\x88": lambda vm: vm.stack.append(True),
    b"\x89": lambda vm: vm.stack.append(False),
    b"I": _push(_int),
    b"L": _push(lambda vm: int(vm.line().removesuffix(b"L"))),
    b"J": _push(_i4),
    b"K": lambda vm: vm.stack.append(vm.read(1)[0]),
    b"M": _push(_u2),
    b"\x8a": _push(_long(_u1)),
    b"\x8b": _push(_long(_signed)),
    b"F": _push(lambda vm: float(vm.line())),
    b"G": _push(_f8),
    b"S": _push(_string),
    b"T": _push(lambda vm: _old_string(vm.blob(_signed(vm)))),
    b"U": _push(lambda vm: _old_string(vm.blob(_u1(vm)))),
    b"B": _push(lambda vm: vm.blob(_u4(vm))),
    b"C": _push(lambda vm: vm.blob(_u1(vm))),
    b"\x8e": _push(lambda vm: vm.blob(_u8(vm))),
    b"\x96": _push(lambda vm: vm.blob(_u8(vm))),
    b"V": _push(lambda vm: vm.line().decode("raw-unicode-escape")),
    b"X": _unicode,
    b"\x8c": _push(lambda vm: vm.take(_u1(vm)).decode("utf-8", "surrogatepass")),
    b"\x8d": _push(lambda vm: vm.take(_u8(vm)).decode("utf-8", "surrogatepass")),
    b")": lambda vm: vm.stack.append(()),
    b"t": _tuple,
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"]": lambda vm: vm.stack.append([]),
    b"l": _push(lambda vm: vm.mark()),
    b"}": lambda vm: vm.stack.append({}),
    b"d": _push(_dict),
    b"\x8f": lambda vm: vm.stack.append(set()),
    b"\x91": _push(_frozenset),
    b"a": _append,
    b"e": _appends,
    b"\x90": _appends,
    b"s": _setitem,
    b"u": _setitems,
    b"p": _put,
    b"q": _binput,
    b"r": _long_binput,
    b"\x94": _memoize,
    b"g": _push(lambda vm: vm.memo[int(vm.line())]),
    b"h": _binget,
    b"j": _push(lambda vm: vm.memo[_u4(vm)]),
    b"c": _push(_global),
    b"\x93": _stack_global,
    b"\x82": _push(_extension(_u1)),
    b"\x83": _push(_extension(_u2)),
    b"\x84": _push(_extension(_u4)),
    b"R": _reduce,
    b"\x81": _reduce,
    b"\x92": _newobj_ex,
    b"i": _push(_inst),
    b"o": _push(_obj),
    b"b": _build,
    b"P": _push(lambda vm: _stands_for(vm, vm.line().decode())),
    b"Q": _persistent,
    b"\x97": _outside,
    b"\x98": _outside,
}
