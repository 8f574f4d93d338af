"""Write the small files of other programs that the tests read, with what the programs' own readers make of them.

Run it where the packages are installed, for all files or for those of some programs:

    pip install gguf h5py keras flax onnx joblib
    KERAS_BACKEND=torch python scripts/formats/make_fixtures.py [gguf] [hdf5] [keras] [flax] [onnx] [joblib]

Beside each file lies `<file>.safetensors`, with what the program's own reader gives. Files above 12 kB are kept as
`.xz`. The packages' versions were gguf
0.19.0, h5py 3.16.0, keras 3.15.1, flax 0.12.8, onnx 1.23.2 and joblib 1.6.0.
"""

from __future__ import annotations

import lzma
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parents[2] / "tests" / "data" / "formats"
LARGE = 12_000
"""Bytes above which a file is compressed."""

PLAIN = {"F32": "f4", "F16": "f2", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}
PACKED = ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


def keep(name: str, found: Mapping[str, Any]) -> None:
    """Write what a program reads beside its file."""
    made = {}
    for key, value in found.items():
        array = numpy.asarray(value)
        if array.dtype.name in ("bfloat16", "float8_e5m2"):
            bits = torch.from_numpy(array.view(f"u{array.itemsize}").copy())
            made[key] = bits.view(getattr(torch, array.dtype.name))
        else:
            native = array.astype(array.dtype.newbyteorder("="))
            made[key] = torch.from_numpy(numpy.array(native, order="C")).reshape(array.shape).contiguous()
    save_file(made, HERE / f"{name}.safetensors")


def add_pairs(writer: Any) -> None:
    writer.add_name("größe")
    for code in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{code}")(f"tiny.{code}", 7)
    writer.add_float32("tiny.float32", 0.5)
    writer.add_float64("tiny.float64", 0.1)
    writer.add_bool("tiny.flag", True)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "\n"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.5, 2.0])
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1])


def make_gguf() -> None:
    import gguf

    rng = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(HERE / "all.gguf", "tiny")
    add_pairs(writer)
    for name, code in PLAIN.items():
        writer.add_tensor(f"plain.{name}", (rng.normal(size=(3, 5)) * 9).astype(code))
    writer.add_tensor("vector", rng.normal(size=7).astype("f4"))
    for name in PACKED:
        kind = gguf.GGMLQuantizationType[name]
        data = gguf.quantize(rng.normal(size=(2, 512)).astype("f4"), kind)
        writer.add_tensor(f"packed.{name}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = {t.name: torch.from_numpy(numpy.array(t.data)) for t in gguf.GGUFReader(HERE / "all.gguf").tensors}
    save_file(theirs, HERE / "all.gguf.safetensors")


def datasets_in(path: Path) -> dict[str, Any]:
    """All datasets of numbers of an HDF5 file, as h5py reads them."""
    import h5py
    import ml_dtypes

    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if getattr(item, "dtype", None) is None or item.shape is None:
            return
        if item.attrs.get("dtype") == "bfloat16":
            found[name] = numpy.asarray(item[()]).view(ml_dtypes.bfloat16)
        elif item.dtype.kind in "fiub":
            found[name] = item[()]

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def fill(file: Any) -> None:
    """Datasets of every kind that is read, and of some that are not."""
    rng = numpy.random.default_rng(1)
    for code in ("f2", "f4", "f8", ">f4", "i1", "u2", ">i4", "i8", "u8", "?"):
        file[f"kinds/{code.strip('>')}{'big' * code.startswith('>')}"] = (rng.normal(size=(2, 3)) * 9).astype(code)
    file["scalar"] = numpy.float32(1.5)
    file["none"] = numpy.zeros((0, 4), "f4")
    file.create_dataset("chunks/plain", data=rng.normal(size=(10, 7)).astype("f4"), chunks=(4, 3))
    file.create_dataset("chunks/small", data=rng.normal(size=(9, 5)), chunks=(4, 5), compression="gzip", shuffle=True)
    file.create_dataset("chunks/sum", data=numpy.arange(50, dtype=">i2"), chunks=(20,), fletcher32=True)
    file.create_dataset("chunks/many", data=rng.normal(size=(40, 40)).astype("f4"), chunks=(2, 2))
    file.create_dataset("chunks/one", data=rng.normal(size=(6, 6)).astype("f4"), chunks=(6, 6), compression="gzip")
    for number in range(40):
        file.create_group(f"blocks/block_{number}")["w"] = numpy.full(3, number, "f4")
    tracked = file.create_group("tracked", track_order=True)
    for number in reversed(range(30)):
        tracked[f"layer_{number}"] = numpy.full(2, number, "f8")
    file["names"] = ["a", "b"]
    file.attrs["model_config"] = '{"name": "tiny"}'


def make_hdf5() -> None:
    import h5py

    for name, version in (("old.h5", "earliest"), ("new.h5", "latest")):
        with h5py.File(HERE / name, "w", libver=version) as file:
            fill(file)
        keep(name, datasets_in(HERE / name))
    with h5py.File(HERE / "latest.h5", "w", libver="latest") as file:
        for number in range(12):
            file[f"a/layer_{number}/w"] = numpy.full((2, 3), number, "f4")
    keep("latest.h5", datasets_in(HERE / "latest.h5"))
    make_layouts(HERE / "layouts.h5", ("v110", "v110"))
    make_layouts(HERE / "layouts_old.h5", "earliest")
    make_links()


def make_layouts(path: Path, versions: Any) -> None:
    """Datasets in every layout, with and without elements, and links of every kind."""
    import h5py
    from h5py import h5d, h5p, h5s, h5t

    w = numpy.arange(6, dtype="f4").reshape(2, 3)
    with h5py.File(path, "w", libver=versions) as file:
        compact = h5p.create(h5p.DATASET_CREATE)
        compact.set_layout(h5d.COMPACT)
        made = h5d.create(file.id, b"compact", h5t.IEEE_F32LE, h5s.create_simple((2, 3)), compact)
        made.write(h5s.ALL, h5s.ALL, w)
        file.create_dataset("external", (3,), "f4", external=[("x.raw", 0, h5py.h5f.UNLIMITED)])
        virtual = h5py.VirtualLayout((2, 3), "f4")
        virtual[:] = h5py.VirtualSource(".", "compact", (2, 3))
        file.create_virtual_dataset("virtual", virtual)
        file.create_dataset("one", data=w, chunks=(2, 3))
        file.create_dataset("one_packed", data=w, chunks=(2, 3), compression="gzip", shuffle=True)
        file.create_dataset("one_larger", data=w.astype(">f8"), chunks=(4, 3), maxshape=(4, 3))
        file.create_dataset("unwritten", (3,), "f4")
        file.create_dataset("unwritten_chunk", (3,), "f4", chunks=(3,))
        file.create_dataset("unwritten_chunks", (0,), "f4", chunks=(3,), maxshape=(3,))
        file.create_dataset("nothing", data=h5py.Empty("f4"))
        file.create_dataset("lzf", data=w, chunks=(2, 3), compression="lzf")
        file.attrs.create("model_config", numpy.bytes_('{"name": "fixed"}'))
        file["soft"], file["elsewhere"] = h5py.SoftLink("/compact"), h5py.ExternalLink("other.h5", "/w")
        file["größe"] = w
        file.attrs["numbers"] = [1, 2, 3]


def make_links() -> None:
    """One dataset under very many names: trees of several levels, and a heap of several blocks."""
    import h5py

    with h5py.File(HERE / "links.h5", "w", libver="latest") as file:
        w = file.create_dataset("w", data=numpy.arange(3, dtype="f4"))
        few = file.create_group("few", track_order=True)
        for number in range(60):
            few[f"{number * 37 % 60:02}"] = w
        many, long = file.create_group("many"), file.create_group("long")
        for number in range(1200):
            many[f"{number:04}"] = w
        for number in range(2300):
            long[f"{number:04}" + "x" * 240] = w


def make_keras() -> None:
    import zipfile

    import keras

    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Flatten()(x)
    for number in range(10):
        x = keras.layers.Dense(5, name=f"dense_{number}", dtype="bfloat16" if number == 3 else None)(x)
    model = keras.Model(inputs, x)
    model.compile("adam", "mse")
    model.fit(numpy.zeros((2, 8, 8, 3)), numpy.zeros((2, 5)), verbose=0)
    model.save_weights(HERE / "keras.weights.h5")
    model.save(HERE / "keras.keras")
    model.save(HERE / "keras_old.h5")
    inner = HERE / "inner.h5"
    inner.write_bytes(zipfile.ZipFile(HERE / "keras.keras").read("model.weights.h5"))
    keep("keras.keras", datasets_in(inner))
    inner.unlink()
    for name in ("keras.weights.h5", "keras_old.h5"):
        keep(name, datasets_in(HERE / name))


def make_flax() -> None:
    import flax.serialization as flax
    import jax.numpy

    rng = numpy.random.default_rng(2)
    tree = {
        "params": {
            f"layers_{i}": {"kernel": rng.normal(size=(3, 4)).astype("f4"), "bias": numpy.zeros(4, "f2")}
            for i in range(20)
        },
        "batch_stats": {"mean": jax.numpy.ones(3, "bfloat16"), "count": numpy.int64(7), "flag": numpy.array(True)},
        "step": 300,
        "opt_state": {"0": {"mu": {"w": rng.normal(size=2)}, "none": None}, "1": 0.5, "2": 1 + 2j},
    }
    plain = {"params": tree["params"] | {"größe": numpy.zeros((300, 0, 2), "u1"), "s": numpy.array(1.5)}}
    plain["params"]["long"] = numpy.arange(70_000, dtype="u1")
    (HERE / "plain.msgpack").write_bytes(flax.msgpack_serialize(plain))
    keep("plain.msgpack", flattened(plain, ""))
    flax.MAX_CHUNK_SIZE = 100
    tree["params"]["big"] = rng.normal(size=(9, 7)).astype("f4")
    (HERE / "flax.msgpack").write_bytes(flax.msgpack_serialize(tree))
    found = flax.msgpack_restore((HERE / "flax.msgpack").read_bytes())
    keep("flax.msgpack", flattened({k: v for k, v in found.items() if k not in ("opt_state", "step")}, ""))


def flattened(tree: Any, path: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, part in tree.items() for k, v in flattened(part, f"{path}.{key}" if path else key).items()}


def make_onnx() -> None:
    import ml_dtypes
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = numpy.random.default_rng(3)
    plain = {f"plain.{c}": (rng.normal(size=(2, 3)) * 9).astype(c) for c in ("f4", "f2", "f8", "i1", "u2", "i4", "i8")}
    plain["plain.bf16"] = rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16)
    plain["plain.bool"] = numpy.array([True, False])
    plain["plain.c8"] = (rng.normal(size=3) + 1j).astype("c8")
    plain["none"] = numpy.zeros((0, 2), "f4")
    made = [numpy_helper.from_array(array, name) for name, array in plain.items()]
    kinds = {"FLOAT": "f4", "DOUBLE": "f8", "INT64": "i8", "INT32": "i4", "INT8": "i1", "UINT8": "u1", "UINT64": "u8",
             "BOOL": "?", "FLOAT16": "f2", "BFLOAT16": "f4"}  # fmt: skip
    for kind, code in kinds.items():
        values = (rng.normal(size=6) * 99).astype(code)
        made.append(helper.make_tensor(f"fields.{kind}", getattr(TensorProto, kind), (2, 3), values.tolist()))
    made.append(helper.make_tensor("fields.STRING", TensorProto.STRING, (1,), [b"text"]))
    model = helper.make_model(helper.make_graph([], "g", [], [], made), producer_name="test")
    onnx.save(model, HERE / "model.onnx")
    named = onnx.load(HERE / "model.onnx").graph.initializer
    keep("model.onnx", {t.name: numpy_helper.to_array(t) for t in named if t.data_type != TensorProto.STRING})
    big = [numpy_helper.from_array(rng.normal(size=(20, 30)).astype("f4"), f"w{i}") for i in range(3)]
    graph = helper.make_graph([], "g", [], [], [*big, numpy_helper.from_array(numpy.arange(3), "inside")])
    place = {"save_as_external_data": True, "location": "external.onnx.data", "size_threshold": 100}
    (HERE / "external.onnx.data").unlink(missing_ok=True)
    onnx.save_model(helper.make_model(graph), HERE / "external.onnx", **place)
    named = onnx.load(HERE / "external.onnx").graph.initializer
    keep("external.onnx", {t.name: numpy_helper.to_array(t) for t in named})


def make_joblib() -> None:
    import joblib

    rng = numpy.random.default_rng(4)
    tree = {
        "w": rng.normal(size=(30, 40)).astype("f4"),
        "turned": numpy.asfortranarray(rng.normal(size=(3, 5))),
        "big": rng.integers(0, 9, 7).astype(">i4"),
        "layers": [{"k": numpy.full((2, 2), i, "f2")} for i in range(3)],
        "names": numpy.array(["a", None], dtype=object),
        "texts": numpy.array(["one", "three"]),
        "scalar": numpy.float64(2),
        "flag": numpy.array([True]),
        "epoch": 3,
    }
    tree["layers"] = {str(i): part for i, part in enumerate(tree["layers"])}
    tree = {"model": tree, "epoch": 3}
    for name, compress in (("arrays.joblib", 0), ("zlib.joblib", ("zlib", 3)), ("gzip.joblib", ("gzip", 3)),
                           ("bz2.joblib", ("bz2", 3)), ("xz.joblib", ("xz", 3))):  # fmt: skip
        joblib.dump(tree, HERE / name, compress=compress)
    found = joblib.load(HERE / "arrays.joblib")["model"]
    numbers = {k: found[k] for k in ("w", "turned", "big", "flag")}
    keep("arrays.joblib", numbers | {f"layers.{i}.k": part["k"] for i, part in found["layers"].items()})


MAKERS: dict[str, Callable[[], None]] = {
    "gguf": make_gguf,
    "hdf5": make_hdf5,
    "keras": make_keras,
    "flax": make_flax,
    "onnx": make_onnx,
    "joblib": make_joblib,
}


def compress() -> None:
    """Keep the larger files compressed."""
    for path in HERE.iterdir():
        if path.suffix != ".xz" and path.stat().st_size > LARGE:
            path.with_name(f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes(), preset=9))
            path.unlink()


if __name__ == "__main__":
    for program in sys.argv[1:] or MAKERS:
        MAKERS[program]()
    compress()
