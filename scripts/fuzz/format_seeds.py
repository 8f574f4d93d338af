"""Sound files of other programs to start from: those that the tests hold against the programs' own readers."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["SEEDS"]

_DATA = Path(__file__).parents[2] / "tests" / "data" / "formats"


def _read(name: str) -> bytes:
    path = _DATA / name
    return path.read_bytes() if path.exists() else lzma.decompress(path.with_name(f"{name}.xz").read_bytes())


def _files(*names: str) -> tuple[bytes, ...]:
    return tuple(map(_read, names))


def _tar(names: Iterable[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            data, member = _read(name), tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _named_gzip() -> bytes:
    """A small file behind a long name, which may be damaged without harm: all else is under checksums."""
    buffer = io.BytesIO()
    with gzip.GzipFile("n" * 2000, "wb", fileobj=buffer, mtime=0) as file:
        file.write((_DATA / "external.onnx.safetensors").read_bytes())
    return buffer.getvalue()


SEEDS: dict[str, tuple[str, tuple[bytes, ...]]] = {
    "onnx": ("x.onnx", _files("model.onnx")),
    "msgpack": ("x.msgpack", _files("flax.msgpack", "plain.msgpack")),
    "hdf5": ("x.h5", _files("old.h5", "keras.weights.h5", "latest.h5")),
    "keras": ("x.keras", _files("keras.keras")),
    "joblib": ("x.joblib", _files("arrays.joblib")),
    "compressed": ("x.gz", (_named_gzip(), *_files("gzip.joblib", "zlib.joblib", "bz2.joblib", "xz.joblib"))),
    "tar": ("x.nemo", (_tar(["arrays.joblib"]), _tar(["plain.msgpack"]))),
}
"""Reader -> the name that its files get, and inputs that it accepts."""
