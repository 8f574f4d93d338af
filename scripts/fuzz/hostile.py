"""Bad files by name: each is a function that writes one into a folder and gives its path.

`CASES` maps a name to that function and to what is wrong. The suite holds the library against them, and
`who_accepts_what.py` other readers too.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["CASES", "MARKER", "Case", "safetensors_file", "torch_zip"]

MARKER = "it-ran"
"""The file that a pickle would make in the folder if anything ran it."""


@dataclass(frozen=True, slots=True)
class Case:
    """A bad file.

    Args:
        make: writes it into a folder, and gives its path.
        codes: the diagnostics' codes with which it may be refused; `"read"` where it may be read, and rightly.
        kind: `"safetensors"`, `"zip"`, `"pickle"` or `"index"`.
    """

    make: Callable[[Path], Path]
    codes: tuple[str, ...]
    kind: str


CASES: dict[str, Case] = {}


def _case(name: str, kind: str, *codes: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def register(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES[name] = Case(make, codes, kind)
        return make

    return register


# safetensors


def safetensors_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, given as JSON's text or as what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _row(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


_A, _B = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', '"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'

_HEADERS: dict[str, tuple[Any, bytes, tuple[str, ...]]] = {
    "overlapping offsets": ({"a": _row([2], 0, 8), "b": _row([2], 4, 12)}, bytes(12), ("overlap",)),
    "two names for the same bytes": ({"a": _row([1], 0, 4), "b": _row([1], 0, 4)}, bytes(4), ("overlap",)),
    "a gap between tensors": ({"a": _row([1], 0, 4), "b": _row([1], 8, 12)}, bytes(12), ("hole",)),
    "a gap before the first": ({"a": _row([1], 4, 8)}, bytes(8), ("hole",)),
    "reversed offsets": ({"a": _row([1], 4, 0)}, bytes(4), ("size-mismatch",)),
    "huge offsets": ({"a": _row([1], 1 << 63, (1 << 63) + 4)}, bytes(4), ("hole",)),
    "offsets beyond 64 bits": ({"a": _row([1], 1 << 70, (1 << 70) + 4)}, bytes(4), ("hole",)),
    "negative offsets": ({"a": _row([1], -4, 0)}, bytes(4), ("bad-offsets",)),
    "a shape whose product overflows": ({"a": _row([1 << 33, 1 << 33], 0, 4)}, bytes(4), ("shape-overflow",)),
    "an overflow that a zero hides": ({"a": _row([1 << 33, 1 << 33, 0], 0, 0)}, b"", ("shape-overflow",)),
    "2^60 elements in 4 bytes": ({"a": _row([1 << 60], 0, 4)}, bytes(4), ("shape-overflow",)),
    "2^50 elements in 4 bytes": ({"a": _row([1 << 50], 0, 4)}, bytes(4), ("size-mismatch",)),
    "2^50 elements beyond the file": ({"a": _row([1 << 50], 0, 1 << 52)}, bytes(4), ("truncated-file",)),
    "a negative size": ({"a": _row([-1], 0, 4)}, bytes(4), ("bad-shape",)),
    "a size of 1.0": ({"a": _row([1], 0, 4), "b": _row([1.0], 4, 8)}, bytes(8), ("bad-shape",)),
    "a size of true": ({"a": _row([1], 0, 4), "b": _row([True], 4, 8)}, bytes(8), ("bad-shape",)),
    "a size of NaN": ({"a": _row([float("nan")], 0, 4)}, bytes(4), ("bad-shape",)),
    "three offsets": ({"a": _row([1], 0, 4) | {"data_offsets": [0, 4, 8]}}, bytes(4), ("bad-offsets",)),
    "an unknown dtype": ({"a": _row([1], 0, 4, "F33")}, bytes(4), ("unknown-dtype",)),
    "an unknown field": ({"a": _row([1], 0, 4) | {"code": "x"}}, bytes(4), ("unknown-field",)),
    "a missing field": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), ("bad-entry",)),
    "half a byte": ({"a": _row([1], 0, 1, "F4")}, bytes(1), ("bad-shape",)),
    "bytes behind the last tensor": ({"a": _row([1], 0, 4)}, bytes(12), ("trailing-bytes",)),
    "data cut off": ({"a": _row([4], 0, 16)}, bytes(12), ("truncated-file",)),
    "an empty name": ({"": _row([1], 0, 4)}, bytes(4), ("bad-name",)),
    "half a surrogate for a name": ({"\ud800": _row([1], 0, 4)}, bytes(4), ("bad-name",)),
    "a tensor called __metadata__": ({"__metadata__": _row([1], 0, 4)}, bytes(4), ("reserved-name",)),
    "metadata that is no text": ({"__metadata__": {"n": 3}, "a": _row([1], 0, 4)}, bytes(4), ("bad-metadata",)),
    "a name twice": (f"{{{_A},{_A}}}".encode(), bytes(4), ("duplicate-tensor",)),
    "a name twice, the second spelt otherwise": (f"{{{_A},{_A}}}".replace('"a"', '"\\u0061"', 1).encode(), bytes(4),
                                                 ("duplicate-tensor",)),
    "a name twice, with other places": (f'{{{_A},{_B.replace("b", "a", 1)}}}'.encode(), bytes(8),
                                        ("duplicate-tensor",)),
    "a key twice in __metadata__": (f'{{"__metadata__":{{"k":"1","k":"2"}},{_A}}}'.encode(), bytes(4),
                                    ("duplicate-metadata",)),
    "__metadata__ twice": (f'{{"__metadata__":{{}},"__metadata__":{{"a":"b"}},{_A}}}'.encode(), bytes(4),
                           ("duplicate-tensor",)),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4),
                      ("duplicate-field",)),
    "a deep JSON bomb": (b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", b"", ("bad-header",)),
    "a number of a million digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,4]}}',
                                     bytes(4), ("bad-header",)),
    "a header that is a list": (b"[1, 2, 3]", b"", ("bad-header",)),
    "a header that is not UTF-8": (b'{"\xff\xfe":1}', b"", ("bad-header",)),
    "NULs behind the header": (f"{{{_A}}}".encode() + b"\0\0\0", bytes(4), ("bad-header",)),
}  # fmt: skip


def _of_header(header: Any, data: bytes) -> Callable[[Path], Path]:
    return lambda folder: safetensors_file(folder / "model.safetensors", header, data)


for _name, (_text, _data, _codes) in _HEADERS.items():
    CASES[_name] = Case(_of_header(_text, _data), _codes, "safetensors")


@_case("a header of 100 MB in a file of 1 KB", "safetensors", "truncated-file")
def _long_header(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_000) + b"{" + bytes(1000))
    return path


@_case("a header of 2^63 bytes", "safetensors", "header-too-large")
def _absurd_header(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 63) + b"{" + bytes(1000))
    return path


# zips


def torch_zip(value: Any = None) -> dict[str, bytes]:
    """The records of a torch file, by name."""
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(4.0)} if value is None else value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _zipped(path: Path, records: dict[str, bytes], deflate: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED)
    return path


@_case("a zip bomb", "zip", "compressed-records")
def _bomb(folder: Path) -> Path:
    records = torch_zip({"w": torch.zeros(4)})
    data = next(name for name in records if name.endswith("data/0"))
    return _zipped(folder / "model.pt", records | {data: bytes(1 << 28)}, deflate=True)


@_case("deflated records", "zip", "compressed-records")
def _deflated(folder: Path) -> Path:
    return _zipped(folder / "model.pt", torch_zip(), deflate=True)


def _edited(path: Path, old: bytes, new: bytes, nth: int = 0) -> Path:
    data = path.read_bytes()
    at = -1
    for _ in range(nth + 1):
        at = data.index(old, at + 1)
    path.write_bytes(data[:at] + new + data[at + len(old) :])
    return path


@_case("a local header that disagrees on the name", "zip", "damaged-zip")
def _other_name(folder: Path) -> Path:
    return _edited(_zipped(folder / "model.pt", torch_zip()), b"data/0", b"data/9")


@_case("a local header that disagrees on the size", "zip", "damaged-zip")
def _other_size(folder: Path) -> Path:
    return _edited(_zipped(folder / "model.pt", torch_zip()), struct.pack("<II", 16, 16), struct.pack("<II", 8, 8))


@_case("records that overlap", "zip", "damaged-zip")
def _overlapping(folder: Path) -> Path:
    path = _zipped(folder / "model.pt", torch_zip())
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    return _edited(path, struct.pack("<I", infos[2].header_offset), struct.pack("<I", infos[1].header_offset), 0)


@_case("a record twice", "zip", "damaged-zip")
def _record_twice(folder: Path) -> Path:
    records = torch_zip()
    twin = next(n for n in records if n.endswith("data/0"))
    path = _zipped(folder / "model.pt", records | {twin[:-1] + "1": b"x" * 16})
    _edited(path, (twin[:-1] + "1").encode(), twin.encode(), 0)
    return _edited(path, (twin[:-1] + "1").encode(), twin.encode(), 0)


@_case("a record with an absolute name", "zip", "damaged-zip")
def _absolute(folder: Path) -> Path:
    return _zipped(folder / "model.pt", {"/tmp/evil": b"x", **torch_zip()})


@_case("a record named with ..", "zip", "damaged-zip")
def _climbing(folder: Path) -> Path:
    return _zipped(folder / "model.pt", {"archive/../../evil": b"x", **torch_zip()})


@_case("two data.pkl", "zip", "damaged-zip")
def _two_roots(folder: Path) -> Path:
    records = torch_zip()
    return _zipped(folder / "model.pt", records | {"other/data.pkl": next(v for n, v in records.items() if "pkl" in n)})


@_case("a missing storage", "zip", "damaged-zip")
def _missing_storage(folder: Path) -> Path:
    return _zipped(folder / "model.pt", {n: v for n, v in torch_zip().items() if not n.endswith("data/0")})


@_case("a zip cut off", "zip", "damaged-zip")
def _cut_zip(folder: Path) -> Path:
    path = _zipped(folder / "model.pt", torch_zip())
    path.write_bytes(path.read_bytes()[:-40])
    return path


def _with_view(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Callable[[Path], Path]:
    """A torch file whose one tensor is any view of a storage of four floats."""

    def make(folder: Path) -> Path:
        records = torch_zip()
        name = next(n for n in records if n.endswith("data.pkl"))
        numbers = b"".join(_long(n) for n in shape), b"".join(_long(n) for n in strides)
        body = b"".join((b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0",
                         b"0X\x03\0\0\0cpuK\x04tQ", _long(offset), b"(", numbers[0], b"t(", numbers[1],
                         b"t\x89ccollections\nOrderedDict\n)RtR"))  # fmt: skip
        return _zipped(folder / "model.pt", records | {name: b"\x80\x02}X\x01\0\0\0w" + body + b"s."})

    return make


def _long(n: int) -> bytes:
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


for _name, _view, _codes in (
    ("a view that reaches beyond its storage", (2, (4,), (1,)), ("damaged-tensor",)),
    ("a view with an offset of 2^62", (1 << 62, (4,), (1,)), ("damaged-tensor",)),
    ("a view with a negative offset", (-4, (4,), (1,)), ("unreadable-tensors",)),
    ("a view with negative strides", (3, (4,), (-1,)), ("unreadable-tensors",)),
    ("a view of 2^60 elements", (0, (1 << 60,), (1,)), ("damaged-tensor",)),
    ("2^60 elements out of one, by strides of zero", (0, (1 << 30, 1 << 30), (0, 0)), ("damaged-tensor",)),
    ("2^100 elements, by strides of zero", (0, (1 << 50, 1 << 50), (0, 0)), ("damaged-tensor",)),
):
    CASES[_name] = Case(_with_view(*_view), _codes, "zip")


# pickles


class _Reduces:
    def __init__(self, function: Any, *args: Any) -> None:
        self.parts = function, args

    def __reduce__(self) -> Any:
        return self.parts


def _call(module: str, name: str, *args: bytes) -> bytes:
    return f"c{module}\n{name}\n(".encode() + b"".join(args) + b"tR"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _marks(folder: Path) -> str:
    return str(folder / MARKER)


def _hostile(body: Callable[[str], bytes], beside: bool) -> Callable[[Path], Path]:
    """A torch file whose pickle calls something: alone, or beside a sound tensor."""

    def make(folder: Path) -> Path:
        records = torch_zip()
        name = next(n for n in records if n.endswith("data.pkl"))
        call = body(_marks(folder))
        sound = records[name]
        if beside:  # the sound dictionary, with one more item
            pickled = sound[:-1] + _text("evil") + call + b"s."
        else:
            pickled = b"\x80\x02" + call + b"."
        return _zipped(folder / "model.pt", records | {name: pickled})

    return make


_CALLS: dict[str, Callable[[str], bytes]] = {
    "os.system": lambda marker: _call("os", "system", _text(f"touch {marker}")),
    "posix.system": lambda marker: _call("posix", "system", _text(f"touch {marker}")),
    "subprocess.run": lambda marker: _call("subprocess", "check_call", b"(" + _text("touch") + _text(marker) + b"l"),
    "eval": lambda marker: _call("builtins", "eval", _text(f"open({marker!r}, 'w').close()")),
    "exec": lambda marker: _call("builtins", "exec", _text(f"open({marker!r}, 'w').close()")),
    "a chain of getattr": lambda marker: (
        b"cbuiltins\ngetattr\n(" + _call("builtins", "__import__", _text("os")) + _text("system") + b"tR("
        + _text(f"touch {marker}") + b"tR"
    ),
    "torch.hub": lambda marker: _call("torch.hub", "load", _text(str(Path(marker).parent)), _text("x")),
    "torch.load": lambda marker: _call("torch", "load", _text(marker)),
    "builtins.open": lambda marker: _call("builtins", "open", _text(marker), _text("w")),
    "pathlib's touch": lambda marker: _call("pathlib", "Path.touch", _call("pathlib", "PosixPath", _text(marker))),
    "numpy's runstring": lambda marker: _call("numpy.testing._private.utils", "runstring",
                                              _text(f"open({marker!r}, 'w').close()"), b"}"),
}  # fmt: skip

for _name, _body in _CALLS.items():
    CASES[f"a pickle that calls {_name}"] = Case(
        _hostile(_body, beside=False), ("unsafe-pickle", "no-tensors"), "pickle"
    )
    _codes = (
        "unsafe-pickle",
        "read",
    )  # the tensor can be read; what would be called is told, or refused where it is plain
    CASES[f"a tensor, and beside it a call of {_name}"] = Case(_hostile(_body, beside=True), _codes, "pickle")


def _raw_pickle(body: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        records = torch_zip()
        name = next(n for n in records if n.endswith("data.pkl"))
        return _zipped(folder / "model.pt", records | {name: body})

    return make


def _shared(levels: int, name: str) -> bytes:
    """A dictionary of two dictionaries that are one, and so on: 2^levels paths to one tensor."""
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0"
        b"0X\x03\0\0\0cpuK\x04tQK\0(K\x04t(K\x01t\x89ccollections\nOrderedDict\n)RtR"
    )
    body = tensor + b"q\x00"  # each level is built, memoised and taken from the stack; only the last stays there
    for level in range(levels):
        body += b"0}(" + _text(name + "a") + bytes([0x68, level]) + _text(name + "b") + bytes([0x68, level])
        body += b"uq" + bytes([level + 1])
    return b"\x80\x02" + body + b"."


for _name, _bytes, _codes in (
    ("lists nested 10^5 deep", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", ("no-tensors",)),
    ("tuples nested 10^5 deep", b"\x80\x02N" + b"\x85" * 100_000 + b".", ("no-tensors",)),
    (
        "a memo that doubles a hundred times",
        b"\x80\x02]q\x00"
        + b"".join(b"0](" + bytes([0x68, i, 0x68, i]) + b"eq" + bytes([i + 1]) for i in range(100))
        + b".",
        ("no-tensors",),
    ),
    ("2^40 paths to one tensor", _shared(40, ""), ("ambiguous-subtree",)),
    ("2^16 paths with names of 10,000 characters", _shared(16, "n" * 10_000), ("ambiguous-subtree",)),
    ("a key that takes 2^100 steps to hash", b"\x80\x02}K\x01" + b"2\x86" * 100 + b"K\x02s.", ("damaged-pickle",)),
    ("ten million empty sets", b"\x80\x04(" + b"\x8f" * 10_000_000 + b"t.", ("damaged-pickle",)),
    ("a memo of 2^31 slots", b"\x80\x02Nr\xff\xff\xff\x7f.", ("no-tensors",)),
    ("a text of 2^40 bytes", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.", ("damaged-pickle",)),
    ("an unknown opcode", b"\x80\x02\xfe.", ("damaged-pickle",)),
    ("a pickle without an end", b"\x80\x02}", ("damaged-pickle",)),
):
    CASES[_name] = Case(_raw_pickle(_bytes), _codes, "pickle")


@_case("a plain pickle that calls os.system", "pickle", "unsafe-pickle")
def _plain_pickle(folder: Path) -> Path:
    path = folder / "model.pdparams"
    path.write_bytes(pickle.dumps(_Reduces(os.system, f"touch {_marks(folder)}"), 2))
    return path


@_case("a LoDTensor, which is made by eval", "pickle", "unsafe-pickle")
def _lod(folder: Path) -> Path:
    path = folder / "model.pdparams"
    body = _call("builtins", "eval", _text("data"), b"}" + _text("data") + b"K\x01s")
    path.write_bytes(b"\x80\x02}" + _text("w") + body + b"s.")
    return path


# indices


def _index(names: dict[str, str], *codes: str) -> Case:
    def make(folder: Path) -> Path:
        inside = folder / "model"
        inside.mkdir()
        for place in (folder / "outside.safetensors", inside / "a.safetensors"):
            safetensors_file(place, {"w": _row([1], 0, 4)}, bytes(4))
        weight_map = {key: name.format(folder=folder) for key, name in names.items()}
        (inside / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return inside

    return Case(make, codes, "index")


CASES |= {
    "an index that leaves its folder by ..": _index({"w": "../outside.safetensors"}, "unsafe-index"),
    "an index that names an absolute path": _index({"w": "{folder}/outside.safetensors"}, "unsafe-index"),
    "an index that climbs behind a folder": _index({"w": "x/../../outside.safetensors"}, "unsafe-index"),
    "an index that climbs by backslashes": _index({"w": "..\\outside.safetensors"}, "unsafe-index"),
    "an index that names a drive": _index({"w": "C:outside.safetensors"}, "unsafe-index"),
    "an index that names a NUL": _index({"w": "a\0.safetensors"}, "unsafe-index"),
    "an index that names half a surrogate": _index({"w": "\ud800.safetensors"}, "unsafe-index"),
    "an index that names itself": _index({"w": "model.safetensors.index.json"}, "nested-index"),
    "an index of a shard that is not there": _index({"w": "b.safetensors"}, "missing-shard"),
    "an index of a key that is not there": _index({"v": "a.safetensors"}, "missing-key-in-shard"),
}


@_case("an index with a key twice", "index", "duplicate-key")
def _index_twice(folder: Path) -> Path:
    inside = CASES["an index of a shard that is not there"].make(folder)
    text = '{"weight_map": {"w": "a.safetensors", "w": "a.safetensors"}}'
    (inside / "model.safetensors.index.json").write_text(text)
    return inside


@_case("a deep JSON bomb for an index", "index", "bad-index")
def _index_bomb(folder: Path) -> Path:
    inside = CASES["an index of a shard that is not there"].make(folder)
    (inside / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 1_000_000)
    return inside


@_case("an index whose shard is a link out of the folder", "index", "read")
def _linked(folder: Path) -> Path:
    inside = CASES["an index of a shard that is not there"].make(folder)
    (inside / "b.safetensors").symlink_to(folder / "outside.safetensors")
    (inside / "a.safetensors").unlink()
    return inside
