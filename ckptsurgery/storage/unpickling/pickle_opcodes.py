"""The opcodes of pickle protocols 0 to 5, each a small function on the machine's stack and memo.

What an opcode makes is paid for in bytes, by what it takes in CPython (`sys.getsizeof`, and 16 for the collector): one
byte of a file can make an object of two hundred. Small things are taken from the credit in passing, and the machine
looks at it every now and then; what has a length of its own goes through `spend`, which looks at once.
"""

from __future__ import annotations

import codecs
import struct
import warnings
from collections.abc import Callable
from typing import Any

from ...errors import CheckpointError, Diagnostic
from .inert import Blob, Opaque
from .pickle_stack import PickleStack

__all__ = ["OPCODES", "Stop", "damaged", "trailing"]

_MAX_PROTOCOL = 5


class Stop(Exception):
    """The pickle's end; not an error."""


def damaged(source: str, why: str) -> CheckpointError:
    """The error for a pickle that ends early or makes no sense."""
    return CheckpointError(
        Diagnostic("damaged-pickle", f"the pickle in {source!r} cannot be read: {why}", place=source,
                   help="the file is truncated or damaged, or no checkpoint: copy or download it again")
    )  # fmt: skip


def trailing(source: str, nbytes: int, writer: str) -> CheckpointError:
    """The error for a file that goes on behind what was read."""
    text = f"{source!r} has {nbytes:,} bytes behind its pickle, which would be left out"
    help = f"if {writer} was called several times, write each object to a file of its own; else copy the file again"
    return CheckpointError(Diagnostic("trailing-bytes", text, place=source, help=help))


def _unpack(layout: str) -> Callable[[PickleStack], Any]:
    read = struct.Struct(layout)
    size, unpack = read.size, read.unpack

    def value(vm: PickleStack) -> Any:
        return unpack(vm.take(size))[0]

    return value


_u1, _u2, _u4, _u8 = _unpack("<B"), _unpack("<H"), _unpack("<I"), _unpack("<Q")
_i4, _f8 = _unpack("<i"), _unpack(">d")


# Bytes of an object, a slot of a list and a key with its value in a dictionary.
_INT, _FLOAT, _TEXT, _BYTES, _TUPLE, _LIST, _DICT, _SET, _GLOBAL = 32, 24, 64, 280, 56, 72, 80, 232, 320
_SLOT, _ITEM, _FAR = 8, 104, 160


def _push(value: Callable[[PickleStack], Any]) -> Callable[[PickleStack], None]:
    def handler(vm: PickleStack) -> None:
        made = value(vm)  # first, since it may change what the stack is
        vm.stack.append(made)

    return handler


def _proto(vm: PickleStack) -> None:
    if vm.take(1)[0] > _MAX_PROTOCOL:
        raise ValueError("unknown protocol")


def _stop(vm: PickleStack) -> None:
    raise Stop


def _mark(vm: PickleStack) -> None:
    vm.credit -= _LIST + _SLOT * len(vm.stack)  # until the mark is taken away
    vm.outer.append(vm.stack)
    vm.stack = []


def _pop(vm: PickleStack) -> None:
    if vm.stack:
        vm.stack.pop()
    else:
        vm.mark()


def _pop_mark(vm: PickleStack) -> None:
    vm.mark()


def _frame(vm: PickleStack) -> None:
    vm.take(8)  # frames only help streaming


def _int(vm: PickleStack) -> Any:
    text = vm.line()
    vm.credit -= _INT + len(text)
    return {b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text)


def _old_long(vm: PickleStack) -> int:
    text = vm.line()
    vm.credit -= _INT + len(text)
    return int(text.removesuffix(b"L"))


def _long(size: Callable[[PickleStack], int]) -> Callable[[PickleStack], int]:
    def value(vm: PickleStack) -> int:
        count = size(vm)
        vm.spend(_INT + 2 * count)
        return int.from_bytes(vm.take(count), "little", signed=True)

    return value


def _number(read: Callable[[PickleStack], Any], size: int) -> Callable[[PickleStack], None]:
    def handler(vm: PickleStack) -> None:
        vm.credit -= size
        vm.stack.append(read(vm))

    return handler


def _string(vm: PickleStack) -> Any:
    text = vm.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in b"\"'":
        raise ValueError("not a string")
    vm.credit -= _BYTES + len(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes that escape nothing
        return _old_string(codecs.escape_decode(text[1:-1])[0])


def _old_string(data: bytes | Blob) -> Any:
    # a Python 2 str is text or bytes, nobody knows; ASCII is both
    return data.decode("ascii") if isinstance(data, bytes) and data.isascii() else data


def _signed(vm: PickleStack) -> int:
    size = int(_i4(vm))
    if size < 0:
        raise ValueError("negative size")
    return size


def _unicode(vm: PickleStack) -> None:
    # the most frequent opcode of a state_dict: written out
    size = int.from_bytes(vm.read(4), "little")
    text = vm.take(size).decode("utf-8", "surrogatepass")
    vm.credit -= _TEXT + size if size <= _SHORT else text.__sizeof__()
    vm.stack.append(text)


def _text(size: Callable[[PickleStack], int]) -> Callable[[PickleStack], str]:
    def value(vm: PickleStack) -> str:
        count = size(vm)
        text = vm.take(count).decode("utf-8", "surrogatepass")
        vm.credit -= _TEXT + count if count <= _SHORT else text.__sizeof__()
        return text

    return value


_SHORT = 32  # bytes; a longer text may take four times its bytes, for one character that is far out


def _old_text(vm: PickleStack) -> str:
    text = vm.line().decode("raw-unicode-escape")
    vm.credit -= _TEXT + text.__sizeof__()
    return text


def _memoize(vm: PickleStack) -> None:
    if vm.far:
        _keep(vm, len(vm.memo) + len(vm.far))
    else:
        vm.memo.append(vm.stack[-1])
        vm.credit -= _SLOT


def _keep(vm: PickleStack, index: int) -> None:
    """Notes the top of the stack under a number; numbers come one after another, save in files made by hand."""
    memo = vm.memo
    if index == len(memo):
        memo.append(vm.stack[-1])
        vm.credit -= _SLOT
        vm.far.pop(index, None)
    elif 0 <= index < len(memo):
        memo[index] = vm.stack[-1]
    else:
        vm.far[index] = vm.stack[-1]
        vm.credit -= _FAR


def _kept(vm: PickleStack, index: int) -> Any:
    return vm.memo[index] if 0 <= index < len(vm.memo) else vm.far[index]


def _binput(vm: PickleStack) -> None:
    _keep(vm, vm.read(1)[0])


def _long_binput(vm: PickleStack) -> None:
    _keep(vm, int.from_bytes(vm.read(4), "little"))


def _put(vm: PickleStack) -> None:
    _keep(vm, int(vm.line()))


def _binget(vm: PickleStack) -> None:
    vm.stack.append(_kept(vm, vm.read(1)[0]))


def _long_binget(vm: PickleStack) -> None:
    vm.stack.append(_kept(vm, int.from_bytes(vm.read(4), "little")))


def _tuple(vm: PickleStack) -> None:
    vm.spend(_TUPLE + _SLOT * len(vm.stack))
    items = tuple(vm.mark())
    vm.stack.append(items)


def _tuple_of(count: int) -> Callable[[PickleStack], None]:
    def handler(vm: PickleStack) -> None:
        stack = vm.stack
        if len(stack) < count:
            raise IndexError
        vm.credit -= _TUPLE + _SLOT * count
        stack[-count:] = (tuple(stack[-count:]),)

    return handler


def _new(make: type, size: int) -> Callable[[PickleStack], None]:
    def handler(vm: PickleStack) -> None:
        vm.credit -= size
        vm.stack.append(make())

    return handler


def _dict(vm: PickleStack) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    vm.credit -= _DICT
    vm.update(made, vm.mark())
    return made


def _list(vm: PickleStack) -> list[Any]:
    made = vm.mark()
    vm.spend(_LIST + _SLOT * len(made))
    return made


def _setitem(vm: PickleStack) -> None:
    value, key = vm.stack.pop(), vm.stack.pop()
    vm.update(vm.stack[-1], [key, value])


def _setitems(vm: PickleStack) -> None:
    items = vm.mark()
    vm.update(vm.stack[-1], items)


def _append(vm: PickleStack) -> None:
    item = vm.stack.pop()
    vm.extend(vm.stack[-1], [item])


def _appends(vm: PickleStack) -> None:
    items = vm.mark()
    vm.extend(vm.stack[-1], items)


def _frozenset(vm: PickleStack) -> frozenset[Any]:
    items = vm.mark()
    vm.spend(_SET + _ITEM * len(items))
    return frozenset([vm.key(item) for item in items])


def _global(vm: PickleStack) -> Opaque:
    module, name = vm.line().decode(), vm.line().decode()
    vm.spend(_GLOBAL + 8 * (len(module) + len(name)))
    return Opaque(module, name)


def _stack_global(vm: PickleStack) -> None:
    name, module = vm.stack.pop(), vm.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise ValueError("not a name")
    vm.spend(_GLOBAL + 4 * (len(module) + len(name)))
    vm.stack.append(Opaque(module, name))


def _extension(size: Callable[[PickleStack], int]) -> Callable[[PickleStack], Opaque]:
    # the registry behind these numbers lives in the process that wrote the file
    def value(vm: PickleStack) -> Opaque:
        vm.credit -= _GLOBAL
        return Opaque("copyreg", f"extension_{size(vm)}")

    return value


def _reduce(vm: PickleStack) -> None:
    args = vm.stack.pop()
    vm.stack[-1] = vm.call(vm.stack[-1], args)


def _newobj_ex(vm: PickleStack) -> None:
    named, args = vm.stack.pop(), vm.stack.pop()
    if named:
        made = vm.stack[-1]
        vm.credit -= _GLOBAL
        vm.stack[-1] = Opaque(getattr(made, "module", ""), getattr(made, "name", ""), (args, named))
    else:
        vm.stack[-1] = vm.call(vm.stack[-1], args)


def _inst(vm: PickleStack) -> Any:
    made = _global(vm)
    return vm.call(made, tuple(vm.mark()))


def _obj(vm: PickleStack) -> Any:
    made, *args = vm.mark()
    return vm.call(made, tuple(args))


def _build(vm: PickleStack) -> None:
    state = vm.stack.pop()
    vm.build(vm.stack[-1], state)


def _persistent(vm: PickleStack) -> None:
    vm.stack[-1] = _stands_for(vm, vm.stack[-1])


def _stands_for(vm: PickleStack, identity: Any) -> Any:
    if vm.persistent is None:
        raise damaged(vm.source, "it refers to things outside of it (persistent ids)")
    return vm.persistent(identity)


def _outside(vm: PickleStack) -> None:
    raise damaged(vm.source, "it keeps its buffers outside (protocol 5, out of band)")


OPCODES: dict[bytes, Callable[[PickleStack], None]] = {
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
    b"L": _push(_old_long),
    b"J": _number(_i4, _INT),
    b"K": lambda vm: vm.stack.append(vm.read(1)[0]),
    b"M": _number(_u2, _INT),
    b"\x8a": _push(_long(_u1)),
    b"\x8b": _push(_long(_signed)),
    b"F": _number(lambda vm: float(vm.line()), _FLOAT),
    b"G": _number(_f8, _FLOAT),
    b"S": _push(_string),
    b"T": _push(lambda vm: _old_string(vm.blob(_signed(vm)))),
    b"U": _push(lambda vm: _old_string(vm.blob(_u1(vm)))),
    b"B": _push(lambda vm: vm.blob(_u4(vm))),
    b"C": _push(lambda vm: vm.blob(_u1(vm))),
    b"\x8e": _push(lambda vm: vm.blob(_u8(vm))),
    b"\x96": _push(lambda vm: vm.blob(_u8(vm))),
    b"V": _push(_old_text),
    b"X": _unicode,
    b"\x8c": _push(_text(_u1)),
    b"\x8d": _push(_text(_u8)),
    b")": lambda vm: vm.stack.append(()),
    b"t": _tuple,
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"]": _new(list, _LIST),
    b"l": _push(_list),
    b"}": _new(dict, _DICT),
    b"d": _push(_dict),
    b"\x8f": _new(set, _SET),
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
    b"g": _push(lambda vm: _kept(vm, int(vm.line()))),
    b"h": _binget,
    b"j": _long_binget,
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
