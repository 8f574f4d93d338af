"""The opcodes that large pickles consist of, carried out on bytes that were read ahead.

The metadata of a sharded checkpoint has millions of opcodes, of which most push a small value or an entry of the memo.
Reading each argument from the file and calling a function for it takes longer than the rest. This loop does those in
place, calls the functions of `pickle_opcodes.py` for opcodes without an argument, and leaves any other one to the
machine. Two runs of opcodes that every object of protocol 4 begins with, and every `torch.Size`, are done at once.
The meaning and the price of an opcode are the same there and here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from .inert import Opaque
from .pickle_opcodes import OPCODES
from .pickle_stack import PickleStack

__all__ = ["LONGEST", "run_frequent"]

LONGEST = 257
"""Bytes that an opcode of this loop takes at most, with an argument of a fixed size or of one byte's size."""

_Handler = Callable[[PickleStack], None]

_TURN = range(4096)  # opcodes between two looks at the credit
_u4, _i4 = struct.Struct("<I").unpack_from, struct.Struct("<i").unpack_from


def _begin_object(vm: PickleStack) -> None:
    """Make the object of the class on the stack, note it and its empty state, and set a mark for the state's items."""
    stack = vm.stack
    made = stack[-1] = vm.call(stack[-1], ())
    state: dict[Any, Any] = {}
    stack.append(state)
    vm.memo += (made, state)
    vm.credit -= 152 + 8 * len(stack)
    vm.outer.append(stack)
    vm.stack = []


def _call_with_tuple(count: int) -> _Handler:
    def handler(vm: PickleStack) -> None:
        """Call the function below the last values with a tuple of them; note tuple, arguments and result."""
        stack = vm.stack
        args = (tuple(stack[-count:]),)
        del stack[-count:]
        vm.credit -= 120 + 8 * count
        made = stack[-1] = vm.call(stack[-1], args)
        vm.memo += (args[0], args, made)

    return handler


_WITHOUT: list[_Handler | None] = [None] * 256
"""By opcode, those without an argument, whose meaning does not depend on the position in the file."""

for _opcode in b"(01tl\x85\x86\x87]}d\x8f\x91ae\x90su\x93R\x81o2N\x88\x89)":
    _WITHOUT[_opcode] = OPCODES[bytes([_opcode])]

_RUNS: dict[int, tuple[bytes, _Handler]] = {
    ord(")"): (b")\x81\x94}\x94(", _begin_object),
    0x85: (b"\x85\x94\x85\x94R\x94", _call_with_tuple(1)),
    0x86: (b"\x86\x94\x85\x94R\x94", _call_with_tuple(2)),
    0x87: (b"\x87\x94\x85\x94R\x94", _call_with_tuple(3)),
}
"""By first opcode, runs of opcodes that are carried out at once."""


def _with_argument(vm: PickleStack, data: bytes, at: int) -> int:
    """Carry out one of the other opcodes with an argument; return the position behind it, or `at` if it is none."""
    op, stack = data[at], vm.stack
    if op == 0x68:  # BINGET
        stack.append(vm.memo[data[at + 1]])
        return at + 2
    if op == 0x8C:  # SHORT_BINUNICODE
        first, behind = at + 2, at + 2 + data[at + 1]
        text = data[first:behind].decode("utf-8", "surrogatepass")
        vm.credit -= 64 + behind - first if behind - first <= 32 else text.__sizeof__()
        stack.append(text)
        return behind
    if op == 0x71 and data[at + 1] == len(vm.memo):  # BINPUT
        vm.memo.append(stack[-1])
        return at + 2
    if op == 0x4A:  # BININT
        stack.append(_i4(data, at + 1)[0])
        vm.credit -= 32
        return at + 5
    if op == 0x4D:  # BININT2
        stack.append(data[at + 1] | data[at + 2] << 8)
        vm.credit -= 32
        return at + 3
    return at


def run_frequent(vm: PickleStack, data: bytes, start: int, at: int) -> int:
    """Carry out some thousand opcodes at most, leave the file behind the last one, and return the position in `data`.

    Args:
        vm: the machine.
        data: a part of the pickle. start: its position in the file.
        at: the position of an opcode in it.
    """
    last, memo, stack, without, runs = len(data) - LONGEST, vm.memo, vm.stack, _WITHOUT, _RUNS
    noted = len(memo)
    try:
        for _ in _TURN if not vm.far else ():  # else entries of the memo have numbers of their own
            if at > last:
                break
            op = data[at]
            if op == 0x94:  # MEMOIZE
                at += 1
                memo.append(stack[-1])
            elif op == 0x6A:  # LONG_BINGET
                at += 5
                stack.append(memo[_u4(data, at - 4)[0]])
            elif op == 0x4B:  # BININT1
                at += 2
                stack.append(data[at - 1])
            elif op == 0x75:  # SETITEMS
                at += 1
                items = vm.mark()
                stack = vm.stack
                vm.update(stack[-1], items)
            elif op == 0x62 and type(stack[-2]) is Opaque:  # BUILD
                at += 1
                state = stack.pop()
                stack[-1].state = state
            elif op in runs and data.startswith(runs[op][0], at):
                run, handler = runs[op]
                at += len(run)
                handler(vm)
                stack = vm.stack
            elif (simple := without[op]) is not None:
                at += 1
                simple(vm)
                stack = vm.stack
            else:
                behind = _with_argument(vm, data, at)
                if behind == at:
                    break
                at = behind
    finally:
        vm.file.seek(start + at)
        vm.credit -= 8 * (len(memo) - noted)
    return at
