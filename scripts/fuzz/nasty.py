"""More bad files by name: what blows up, what is no file at all, and what trips a reader that is written in Python.

Importing this adds them to `CASES`.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from hostile import (
    CASES,
    MARKER,
    Case,
    _index,
    _long,
    _raw_pickle,
    _row,
    _text,
    _zipped,
    safetensors_file,
    torch_zip,
)

__all__ = ["BLOWN_UP", "CASES", "MARKER"]

_SCALAR = '"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'


def _header(name: str, header: Any, data: bytes, *codes: str) -> None:
    def make(folder: Path) -> Path:
        return safetensors_file(folder / "model.safetensors", header, data)

    CASES[name] = Case(make, codes, "safetensors")


_header("offsets of 1e0", b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1e0]}}', b"x", "bad-offsets")
_header("an offset of Infinity", {"a": _row([1], 0, float("inf"))}, bytes(4), "bad-offsets")
_header("an offset of true", b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[false,true]}}', b"x", "bad-offsets")
_header("an offset of -0", b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', b"x", "read")
for _name, _shape in (("an empty object for a shape", "{}"), ("an empty text for a shape", '""')):
    _text_of = f'{{{_SCALAR},"b":{{"dtype":"F32","shape":{_shape},"data_offsets":[4,8]}}}}'
    _header(_name, _text_of.encode(), bytes(8), "bad-shape")
_header("65 dimensions", {"a": _row([1] * 65, 0, 4)}, bytes(4), "shape-overflow")
_header("a million dimensions", {"a": _row([1] * 1_000_000, 0, 4)}, bytes(4), "shape-overflow")
_header("no elements, and 2^63 of nothing", {"a": _row([0, 1 << 63], 0, 0)}, b"", "shape-overflow")
_header("no elements, and strides beyond 64 bits", {"a": _row([0, 1 << 62, 1 << 62], 0, 0)}, b"", "shape-overflow")
_header("a name of a million characters, twice", f'{{"{"n" * 1_000_000}":1,"{"n" * 1_000_000}":1}}'.encode(), b"",
        "duplicate-tensor")  # fmt: skip
_header("a name that steers the terminal", {"a\0\n\x1b]0;x\x07\u202e": _row([1], 0, 4)}, bytes(4), "read")
_header("names of other folders", {"../../x": _row([1], 0, 4), "/x": _row([1], 4, 8)}, bytes(8), "read")
_header("half a surrogate in the metadata", b'{"__metadata__":{"k":"\\ud800"},"a":{"dtype":"U8","shape":[0],'
        b'"data_offsets":[0,0]}}', b"", "bad-metadata")  # fmt: skip
_header("a mark of byte order", b"\xef\xbb\xbf{}", b"", "bad-header")
_header("a header in UTF-16", "{}".encode("utf-16"), b"", "bad-header")
_header("a header of empty lists", b'{"a":[' + b"[]," * 300_000 + b"[]]}", b"", "bad-header")
_header("a header of empty objects", b'{"a":[' + b"{}," * 300_000 + b"{}]}", b"", "bad-header")


# pickles

_STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + _STORAGE + b"K\0(K\x04t(K\x01t\x89ccollections\nOrderedDict\n)RtR"
_LARGE = b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000
_ONE = b"ctorch._utils\n_rebuild_tensor_v2\n(" + _STORAGE


def _beside(body: bytes) -> bytes:
    """A pickle of a sound tensor and of something else."""
    return b"\x80\x04}(" + _text("w") + _TENSOR + _text("x") + body + b"u."


def _alone(key: bytes, value: bytes) -> bytes:
    return b"\x80\x04}" + key + value + b"s."


_DAMAGED = ("damaged-pickle",)
_MANY = 150_000
_MILLION = b"X\x40\x42\x0f\0" + b"m" * 1_000_000
BLOWN_UP: dict[str, bytes] = {
    "a million Nones": _beside(b"(" + b"N" * _MANY + b"t"),
    "empty byte strings": _beside(b"(" + b"C\0" * _MANY + b"t"),
    "empty sets": _beside(b"(" + b"\x8f" * _MANY + b"t"),
    "empty dictionaries": _beside(b"(" + b"}" * _MANY + b"t"),
    "dictionaries of one": _beside(b"(" + b"}NNs" * _MANY + b"t"),
    "ordered dictionaries": _beside(b"ccollections\nOrderedDict\nq\x010(" + b"h\x01)R" * _MANY + b"t"),
    "tuples of one": _beside(b"(" + b")\x85" * _MANY + b"t"),
    "small integers": _beside(b"(" + b"M\xff\xff" * _MANY + b"t"),
    "short texts": _beside(b"(" + b"\x8c\x02ab" * _MANY + b"t"),
    "marks": b"\x80\x04" + b"(" * _MANY,
    "a stack": b"\x80\x04" + b"N" * _MANY,
    "a memo of one": b"\x80\x04N" + b"\x94" * _MANY,
    "a memo with holes": b"\x80\x04N" + b"".join(b"r" + struct.pack("<I", 7 * i) for i in range(_MANY)),
    "calls of a function with a long name": b"\x80\x04(" + _MILLION + _text("n") + b"\x93q\x01"
    + b"h\x01)R" * 100_000 + b"t.",
    "names made of one long name": b"\x80\x04(" + _MILLION + b"q\x01" + b"h\x01h\x01\x93" * 50_000,
    "one byte string, many times": _beside(b"(C\xff" + b"z" * 255 + b"q\x01" + b"h\x01" * _MANY + b"t"),
    "one long byte string, many times": _beside(b"(B" + _MILLION[1:] + b"q\x01" + b"h\x01" * _MANY + b"t"),
    "one byte string as the key of many": _beside(
        b"(B\xa0\x0f\0\0" + b"\xf0" * 4000 + b"q\x01" + b"}h\x01Ns" * 50_000 + b"t"
    ),
    "one state for many": _beside(
        b"ccollections\nOrderedDict\nq\x010}(" + b"".join(_text(str(i)) + b"N" for i in range(5000)) + b"uq\x020("
        + b"h\x01)Rh\x02b" * 50_000 + b"t"
    ),
    "one list as many shapes": b"\x80\x04](" + b"K\x01" * 50_000 + b"eq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02"
    + _STORAGE + b"q\x03}(" + b"".join(_text(str(i)) + b"h\x02(h\x03K\0h\x01h\x01\x89NtR" for i in range(3000)) + b"u.",
    "one text as the bytes of many arrays": b"\x80\x02(" + _MILLION
    + b"q\x01Ncnumpy.core.multiarray\n_reconstruct\nq\x02Ncnumpy\nndarray\nq\x03"
    + b"Ncnumpy\ndtype\n(U\x02u1K\0K\x01tRq\x04}("
    + b"".join(
        _text(str(i)) + b"h\x02(h\x03K\0\x85U\x01btR(K\x01J\x40\x42\x0f\0\x85h\x04\x89h\x01tb" for i in range(1000)
    ),
    "one long key above many small parts": b"\x80\x04}" + _MILLION + b"}(" + _text("model") + b"}"
    + _text("w") + _TENSOR + b"s" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(5000)) + b"us.",
}  # fmt: skip
"""Pickles of some megabytes that make a naive reader take a hundred times as much, or all there is."""

for _name, _body, _codes in (
    *((f"a pickle of {name}", body, (*_DAMAGED, "nested-too-deep", "no-tensors", "read"))
      for name, body in BLOWN_UP.items()),
    ("a key of 40,000 bits", _alone(_LARGE, _TENSOR), ("read",)),
    ("a number of 40,000 bits beside a tensor", _beside(_LARGE), ("read",)),
    ("a device of 40,000 bits", _alone(_text("w"), _TENSOR.replace(b"X\x03\0\0\0cpu", _LARGE)), ("read",)),
    ("a key of sets in sets, 3000 deep", _alone(b"(" * 3000 + b"N" + b"\x91" * 3000, _TENSOR), ("read",)),
    ("a key that is half a surrogate", _alone(b"X\x03\0\0\0\xed\xa0\x80", _TENSOR), ("read", "bad-name")),
    ("keys 1 and '1'", b"\x80\x04}(K\x01" + _TENSOR + _text("1") + _TENSOR + b"u.", ("duplicate-key",)),
    ("parts 1 and '1'", b"\x80\x04}(K\x01N" + _text("1") + b"}" + _text("w") + _TENSOR + b"s" + _text("2") + b"}"
     + _text("w") + _TENSOR + b"su.", ("ambiguous-subtree",)),
    ("a dictionary that holds itself", b"\x80\x04}q\0(" + _text("a") + b"h\0" + _text("w") + _TENSOR + b"u.",
     ("nested-too-deep",)),
    ("a tensor of a thousand dimensions", _alone(_text("w"), _ONE + b"K\0(" + b"K\x01" * 1000 + b"t(" + b"K\x01" * 1000
     + b"t\x89NtR"), ("unreadable-tensors",)),
    ("a tensor of no elements and 2^70 of nothing", _alone(_text("w"), _ONE + b"K\0(K\0" + _long(1 << 70)
     + b"t(K\x01K\x01t\x89NtR"), ("damaged-tensor",)),
    ("a storage called ../data/0", _alone(_text("w"), _TENSOR.replace(b"X\x01\0\0\x000", _text("../data/0"))),
     ("damaged-zip",)),
    ("a storage of two types", b"\x80\x04}(" + _text("w") + _TENSOR + _text("x") + _TENSOR.replace(b"Float", b"Int")
     + b"u.", _DAMAGED),
    ("a storage of 2^62 elements", _alone(_text("w"), _TENSOR.replace(b"cpuK\x04", b"cpu" + _long(1 << 62))),
     ("damaged-tensor",)),
    ("a storage of -4 elements", _alone(_text("w"), _TENSOR.replace(b"cpuK\x04", b"cpu" + _long(-4))), _DAMAGED),
    ("a persistent id that is a number", b"\x80\x04K\x01Q.", _DAMAGED),
    ("a persistent id that is text", b"\x80\x04Pabc\n.", _DAMAGED),
    ("a persistent id with a list for a key", b"\x80\x04" + _STORAGE.replace(b"X\x01\0\0\x000", b"]") + b".", _DAMAGED),
    ("a dtype that is nested 3000 deep", _alone(_text("w"), b"ctorch._utils\n_rebuild_tensor_v3\n(" + _STORAGE
     + b"K\0(K\x04t(K\x01t\x89N" + b"(" * 3000 + b"N" + b"t" * 3000 + b"tR"), ("no-tensors", *_DAMAGED)),
    ("a frame of 2^60 bytes", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + _alone(_text("w"), _TENSOR)[2:],
     ("read",)),
    ("extension opcodes", _beside(b"\x84\xff\xff\xff\x7f"), ("read",)),
    ("a number of -1 bytes", b"\x80\x04\x8b\xff\xff\xff\xff.", _DAMAGED),
    ("a number of 2^31 bytes", b"\x80\x04\x8b\xff\xff\xff\x7f.", _DAMAGED),
    ("a backslash that escapes nothing", _alone(b"S'\\d'\n", _TENSOR), ("read",)),
    ("state for a number", b"\x80\x04K\x01}b.", _DAMAGED),
    ("items for a tuple", b"\x80\x04)(NNu.", _DAMAGED),
    ("a list as a key", b"\x80\x04}]Ns.", _DAMAGED),
    ("a memo below zero", b"\x80\x04Np-1\n0g-1\n.", ("no-tensors",)),
):  # fmt: skip
    CASES[_name] = Case(_raw_pickle(_body), _codes, "pickle")


def _legacy(version: bytes, tree: bytes = b"}.", keys: bytes = b"].") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "model.pth"
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02" + version + b"\x80\x02}.\x80\x02" + tree
                         + b"\x80\x02" + keys)  # fmt: skip
        return path

    return make


def _paddle(value: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "model.pdparams"
        path.write_bytes(pickle.dumps(value, 4))
        return path

    return make


_HALF, _SLICED = numpy.ones(2, "f4"), "UnpackBigParamInfor@@"
CASES |= {
    "a version of 40,000 bits": Case(_legacy(_LARGE + b"."), ("unknown-version",), "pickle"),
    "a version nested 5000 deep": Case(_legacy(b"]" * 5000 + b"a" * 4999 + b"."), ("unknown-version",), "pickle"),
    "a storage with a name of a million characters": Case(
        _legacy(b"M\xe9\x03.", keys=b"]X\x40\x42\x0f\0" + b"k" * 1_000_000 + b"a."), _DAMAGED, "pickle"
    ),
    "slices that are lists": Case(
        _paddle({_SLICED: {"w": {"slices": [["a"]], "OriginShape": [2]}}, "a": _HALF}), ("read",), "pickle"
    ),
    "slices of a shape of true": Case(
        _paddle({_SLICED: {"w": {"slices": ["a"], "OriginShape": [True, 2]}}, "a": _HALF}),
        ("damaged-tensor",),
        "pickle",
    ),
    "one slice used 300,000 times": Case(
        _paddle({_SLICED: {"w": {"slices": ["a"] * 300_000, "OriginShape": [600_000]}}, "a": _HALF}),
        ("read",),
        "pickle",
    ),
}


# zips, indices and what lies beside them


def _metadata(text: bytes) -> Callable[[Path], Path]:
    return lambda folder: _zipped(folder / "model.pt", torch_zip() | {"archive/.metadata.json": text})


def _with(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A sound folder of one shard and its index, and something done to it."""

    def both(folder: Path) -> Path:
        inside = _index({"w": "a.safetensors"}).make(folder)
        make(inside)
        return inside

    return both


def _shard(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    """An index that names as its shard what `make` puts in its place."""

    def shard(inside: Path) -> None:
        (inside / "a.safetensors").unlink()
        make(inside / "a.safetensors")

    return _with(shard)


def _text_index(text: str) -> Callable[[Path], Path]:
    return _with(lambda inside: (inside / "model.safetensors.index.json").write_text(text))


_MAP = '"weight_map": {"w": "a.safetensors"}'
CASES |= {
    "metadata of empty lists": Case(_metadata(b'{"a":[' + b"[]," * 300_000 + b"[]]}"), ("read",), "zip"),
    "metadata with half a surrogate": Case(_metadata(b'{"a":"\\ud800"}'), ("read",), "zip"),
    "an index that is a list": Case(_text_index('["weight_map"]'), ("bad-index",), "index"),
    "an index of empty lists": Case(
        _text_index('{"metadata": [' + "[]," * 300_000 + "[]], " + _MAP + "}"), ("bad-index",), "index"
    ),
    "an index with half a surrogate": Case(
        _text_index('{"metadata": {"a": "\\ud800", "b": NaN, "c": 1e999}, ' + _MAP + "}"), ("read",), "index"
    ),
    "an index of 5,000 shards that are not there": Case(
        _text_index(json.dumps({"weight_map": {f"w{i}": f"{i}.safetensors" for i in range(5000)}})),
        ("missing-shard",), "index"
    ),
    "names that differ in case": Case(
        _text_index('{"weight_map": {"w": "a.safetensors", "W": "A.safetensors"}}'), ("missing-shard",), "index"
    ),
    "a shard that is a folder": Case(_shard(Path.mkdir), ("not-a-file",), "index"),
    "a shard that is a pipe": Case(_shard(os.mkfifo), ("not-a-file",), "index"),
    "a shard that is /dev/zero": Case(_shard(lambda path: path.symlink_to("/dev/zero")), ("not-a-file",), "index"),
    "a shard that is a link to itself": Case(
        _shard(lambda path: path.symlink_to(path.name)), ("missing-shard",), "index"
    ),
    "a config.json that is a pipe": Case(_with(lambda p: os.mkfifo(p / "config.json")), ("read",), "index"),
    "a config.json that is /dev/zero": Case(
        _with(lambda p: (p / "config.json").symlink_to("/dev/zero")), ("read",), "index"
    ),
    "a config.json nested 10^5 deep": Case(
        _with(lambda p: (p / "config.json").write_text('{"a":' * 100_000)), ("read",), "index"
    ),
    "a config.json of empty lists": Case(
        _with(lambda p: (p / "config.json").write_text("[" + "[]," * 300_000 + "[]]")), ("read",), "index"
    ),
    "a record of a save that is a pipe": Case(
        _with(lambda p: os.mkfifo(p / ".ckptsurgery-tmp-record.json")), ("bad-record",), "index"
    ),
}  # fmt: skip
