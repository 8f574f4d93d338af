"""Writes `data.pkl` of a torch zip file, opcode by opcode, without torch.

Only what `torch.load(weights_only=True)` reads back is written: plain values, `OrderedDict`s and tensors. Everything
else is left out, and listed.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...specs import DTYPES, TensorSpec
from ..contents import Entry
from ..unpickling.inert import Ordered
from ..unpickling.nodes import name_of
from .storages import contiguous_strides

__all__ = ["OMITTED", "Pickle", "StoredTensor", "writable"]

_DEPTH = 64
_STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage", "C64": "ComplexFloatStorage", "C128": "ComplexDoubleStorage",
}  # fmt: skip
OMITTED = object()
_MOST_TOLD = 1 << 22  # characters of paths of what is left out


class StoredTensor:
    """A tensor whose elements are the record `data/<key>` of the archive.

    Args:
        key: the record's name.
        spec: shape and dtype.
        strides: in elements; None where the tensor is C-contiguous.
        nbytes: of the record.
    """

    __slots__ = ("key", "nbytes", "spec", "strides")

    def __init__(self, key: str, spec: TensorSpec, strides: tuple[int, ...] | None, nbytes: int) -> None:
        self.key = key
        self.spec = spec
        self.strides = strides
        self.nbytes = nbytes


def writable(value: Any, path: str, store: Callable[[Any], StoredTensor | None], left_out: list[str]) -> Any:
    """`value` with its tensors stored by `store` and with nothing in it that weights_only would refuse.

    What has to go leaves a None in a list or tuple and nothing in a mapping; its path is added to `left_out`. `OMITTED`
    comes back where nothing is left.
    """
    return _Pruning(store, left_out).value(value, (None, path), 0)


_Path = tuple[Any, str]  # the path above, or None; and the name of the part


class _Pruning:
    """Goes through a value once; parts that are shared stay shared."""

    def __init__(self, store: Callable[[Any], StoredTensor | None], left_out: list[str]) -> None:
        self.store = store
        self.left_out = left_out
        self.known: dict[int, Any] = {}
        self.characters = _MOST_TOLD

    def leave_out(self, path: _Path) -> None:
        """Note a path; they are put together only here, since names above many small parts may be long."""
        if self.characters < 0:
            return
        parts: list[str] = []
        step: _Path | None = path
        while step is not None:
            step, part = step
            parts.append(part)
        told = ".".join(reversed(parts))
        self.characters -= len(told)
        self.left_out.append(told if self.characters >= 0 else "… and more")

    def value(self, value: Any, path: _Path, depth: int) -> Any:
        if value is None or type(value) in (bool, int, float, str, bytes, complex):
            return value
        if id(value) in self.known:
            made = self.known[id(value)]
        else:
            self.known[id(value)] = OMITTED  # what contains itself cannot be written
            made = self.known[id(value)] = self.part(value, path, depth) if depth < _DEPTH else OMITTED
        if made is OMITTED:
            self.leave_out(path)
        return made

    def part(self, value: Any, path: _Path, depth: int) -> Any:
        stored = self.store(value)
        if stored is not None:
            return stored
        if isinstance(value, Entry):  # of a dtype that torch has not
            return OMITTED
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
            return self.value(value.item(), path, depth)
        if isinstance(value, Mapping):
            return self.mapping(value, path, depth)
        if isinstance(value, (list, tuple)):
            items = [self.value(item, (path, str(i)), depth + 1) for i, item in enumerate(value)]
            items = [None if item is OMITTED else item for item in items]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, (set, frozenset)) and all(type(item) in (bool, int, float, str) for item in value):
            return dict.fromkeys(value).keys()
        if isinstance(value, (int, float, str)):  # an IntEnum, a numpy float64: the plain value is what can be kept
            return int(value) if isinstance(value, int) else float(value) if isinstance(value, float) else str(value)
        return OMITTED

    def mapping(self, value: Mapping[Any, Any], path: _Path, depth: int) -> dict[Any, Any]:
        ordered = isinstance(value, (Ordered, OrderedDict))
        made: dict[Any, Any] = Ordered() if ordered else {}
        for name, part in value.items():
            if not (type(name) in (bool, int, float, str) or name is None):
                self.leave_out((path, name_of(name)))
                continue
            kept = self.value(part, (path, name_of(name)), depth + 1)
            if kept is not OMITTED:
                made[name] = kept
        if isinstance(made, Ordered):
            attributes = value.attributes if isinstance(value, Ordered) else vars(value)
            kept = {name: self.value(part, (path, name_of(name)), depth + 1) for name, part in attributes.items()}
            made.attributes = {name: part for name, part in kept.items() if part is not OMITTED}
        return made


class Pickle:
    """A pickle of protocol 2 in the making.

    >>> import pickle
    >>> pickle.loads(Pickle().dumps({"epoch": 3, "lr": 1e-3, "betas": (0.9, 0.999), "big": 1 << 70}))
    {'epoch': 3, 'lr': 0.001, 'betas': (0.9, 0.999), 'big': 1180591620717411303424}
    """

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._memo: dict[tuple[str, str], int] = {}
        self._shared: dict[int, int] = {}  # id of a container -> its place in the memo
        self._kinds: dict[tuple[object, ...], tuple[bytes, bytes]] = {}  # what stands around the keys of like tensors

    def dumps(self, value: Any) -> bytes:
        """The pickle of a value that `writable` has passed."""
        self._value(value)
        return bytes(self._out + b".")

    def _value(self, value: Any) -> None:
        kind = type(value)
        if kind is str:
            self._text(value)
        elif kind is StoredTensor:
            self._tensor(value)
        elif value is None:
            self._out += b"N"
        elif kind is bool:
            self._out += b"\x88" if value else b"\x89"
        elif kind is int:
            self._int(value)
        elif kind is float:
            self._out += b"G" + struct.pack(">d", value)
        elif id(value) in self._shared:
            self._get(self._shared[id(value)])
        elif isinstance(value, dict) or kind in (list, tuple):
            self._container(value)
            self._shared[id(value)] = self._put("#", str(id(value)))
        elif kind is bytes:
            self._call("_codecs", "encode", (value.decode("latin-1"), "latin1"))
        elif kind is complex:
            self._call("builtins", "complex", (value.real, value.imag))
        else:
            self._call("builtins", "set", (list(value),))

    def _container(self, value: Any) -> None:
        if isinstance(value, dict):
            self._mapping(value)
        elif type(value) is tuple:
            self._sequence(b"(", value, b"t")
        else:
            self._sequence(b"](", value, b"e")

    def _sequence(self, start: bytes, items: Sequence[Any], end: bytes) -> None:
        self._out += start
        for item in items:
            self._value(item)
        self._out += end

    def _call(self, module: str, name: str, args: tuple[Any, ...]) -> None:
        self._global(module, name)
        self._sequence(b"(", args, b"t")
        self._out += b"R"

    def _mapping(self, value: dict[Any, Any]) -> None:
        if isinstance(value, Ordered):
            self._call("collections", "OrderedDict", ())
        else:
            self._out += b"}"
        if value:
            self._out += b"("
            for name, part in value.items():
                self._value(name)
                self._value(part)
            self._out += b"u"
        if isinstance(value, Ordered) and value.attributes:
            self._mapping(value.attributes)
            self._out += b"b"

    def _tensor(self, tensor: StoredTensor) -> None:
        kind = tensor.spec, tensor.strides, tensor.nbytes
        known = self._kinds.get(kind)
        if known is not None:
            before, behind = known
            self._out += before
            self._text(tensor.key, memo=False)
            self._out += behind
            return
        said, start = len(self._memo), len(self._out)
        self._until_key(tensor)
        key = len(self._out)
        self._text(tensor.key, memo=False)
        stop = len(self._out)
        self._from_key(tensor)
        if len(self._memo) == said:  # nothing in it is said for the first time, so the next of its kind is the same
            self._kinds[kind] = bytes(self._out[start:key]), bytes(self._out[stop:])

    def _until_key(self, tensor: StoredTensor) -> None:
        kind = _STORAGES.get(tensor.spec.dtype)
        self._global("torch._utils", "_rebuild_tensor_v2" if kind else "_rebuild_tensor_v3")
        self._out += b"(("
        self._text("storage")
        if kind:
            self._global("torch", kind)
        else:
            self._global("torch.storage", "UntypedStorage")

    def _from_key(self, tensor: StoredTensor) -> None:
        spec = tensor.spec
        shape, kind = spec.shape, spec.dtype in _STORAGES
        if DTYPES[spec.dtype].bits == 4:
            shape = (*shape[:-1], shape[-1] // 2)  # torch counts pairs
        self._text("cpu")
        self._int(tensor.nbytes // DTYPES[spec.dtype].itemsize if kind else tensor.nbytes)
        self._out += b"tQK\x00"
        self._sequence(b"(", shape, b"t")
        self._sequence(b"(", contiguous_strides(shape) if tensor.strides is None else tensor.strides, b"t")
        self._out += b"\x89"
        self._call("collections", "OrderedDict", ())
        if not kind:
            self._global("torch", DTYPES[spec.dtype].torch or "")
        self._out += b"tR"

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self._out += b"K" + bytes((value,))
        elif -(1 << 31) <= value < 1 << 31:
            self._out += b"J" + struct.pack("<i", value)
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            length = bytes((len(data),)) if len(data) < 256 else struct.pack("<i", len(data))
            self._out += (b"\x8a" if len(data) < 256 else b"\x8b") + length + data

    def _text(self, value: str, memo: bool = True) -> None:
        known = self._memo.get(("", value)) if memo else None
        if known is not None:
            self._get(known)
            return
        data = value.encode("utf-8", "surrogatepass")
        self._out += b"X" + struct.pack("<I", len(data)) + data
        if memo:
            self._put("", value)

    def _global(self, module: str, name: str) -> None:
        known = self._memo.get((module, name))
        if known is not None:
            self._get(known)
        else:
            self._out += f"c{module}\n{name}\n".encode()
            self._put(module, name)

    def _put(self, module: str, name: str) -> int:
        index = self._memo[module, name] = len(self._memo)
        self._out += b"q" + bytes((index,)) if index < 256 else b"r" + struct.pack("<I", index)
        return index

    def _get(self, index: int) -> None:
        self._out += b"h" + bytes((index,)) if index < 256 else b"j" + struct.pack("<I", index)
