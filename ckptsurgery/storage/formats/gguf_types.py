"""ggml's types of tensors and of values, by their numbers in a GGUF file.

Source: `GGML_QUANT_SIZES` and `GGUFValueType` of the gguf package, version 0.19.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BLOCKS", "FILE_TYPES", "NUMBERS", "PLAIN", "TYPE_OF", "BlockType"]


class BlockType(NamedTuple):
    """A type of tensor: elements come in blocks of so many bytes."""

    name: str
    elements: int
    nbytes: int


BLOCKS = {
    number: BlockType(*row)
    for number, row in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    }.items()
}  # fmt: skip
"""Number of a type -> its name, elements in a block, bytes of a block."""

PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
"""Number of a type of plain numbers -> its dtype."""

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q6_K": 18, "BF16": 32,
    "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
}  # fmt: skip
"""Name of the type that most of a file's matrices have -> its `general.file_type`; not those of mixed K-quants.

Source: `general.file_type` in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

TYPE_OF = {block.name: number for number, block in BLOCKS.items()}
"""Name of a type -> its number."""

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a type of value -> its code in `struct`."""
