"""Write the small files of other programs that the tests read, with what the programs' own readers make of them.

Run it where the packages are installed: pip install gguf && python scripts/formats/make_fixtures.py
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parents[2] / "tests" / "data" / "formats"
PLAIN = {"F32": "f4", "F16": "f2", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}
PACKED = ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


def add_pairs(writer: gguf.GGUFWriter) -> None:
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


if __name__ == "__main__":
    make_gguf()
