"""Arrays in joblib's files: an object describes one, and its bytes follow the opcode that gives the object its state.

Source: `joblib.numpy_pickle.NumpyArrayWrapper`, version 1.6. Since 1.2 a byte says how many bytes of padding come
first. An array of objects is a pickle of its own there, which is read like any other, and is no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from typing import Any

from ...specs import DTYPES, MOST_DIMENSIONS
from .inert import Array, NumpyType
from .pickle_stack import PickleStack

__all__ = ["set_joblib_state"]

_ALIGNMENT = "numpy_array_alignment_bytes"
_CODE = re.compile(r"([?bBiufcUSVmM])(\d+)")


def set_joblib_state(vm: PickleStack, target: Array, state: dict[Any, Any], inner: Callable[[], Any]) -> None:
    """Give an array what its description says, and pass over its bytes.

    Args:
        vm: the machine, whose file is at the array's bytes.
        target: the array.
        state: its description.
        inner: reads a pickle from the file's position on.

    Raises:
        ValueError, KeyError, EOFError: the description makes no sense, or the bytes are not there.
    """
    shape, kind, order = state["shape"], state["dtype"], state["order"]
    if type(kind) is not NumpyType or type(shape) is not tuple or order not in ("C", "F"):
        raise ValueError("an array of joblib is described in an unknown way")
    if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("no shape")
    target.type, target.shape, target.fortran = kind, shape, order == "F"
    if kind.code.startswith("O"):
        held = inner()
        target.data = held.data if type(held) is Array and type(held.data) is list else None
        return
    if state.get(_ALIGNMENT) is not None:
        vm.take(vm.take(1)[0])
    target.data = vm.blob(prod(shape) * _width(kind.code))


def _width(code: str) -> int:
    """Bytes of an element."""
    dtype = NumpyType(code).dtype
    if dtype is not None:
        return DTYPES[dtype].itemsize
    match = _CODE.fullmatch(code)
    if match is None or len(match[2]) > 9:
        raise ValueError(f"an array of unknown elements, {code[:40]!r}")
    return int(match[2]) * (4 if match[1] == "U" else 1)
