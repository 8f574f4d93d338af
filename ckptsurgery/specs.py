"""What is known of a tensor without its data: shape and dtype. No torch here.

Dtypes go by safetensors' names. `C128`, `C32` and friends exist in torch alone; they have names here so that a torch
file holding them can be inspected, and `DType.safetensors` says which ones a safetensors file can hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from .errors import CheckpointError, Diagnostic, Remedy
from .wording import brief, listed

__all__ = ["DTYPES", "MOST_DIMENSIONS", "DType", "TensorSpec", "Tie", "dtype_name", "is_lossless", "shape_problem"]


@dataclass(frozen=True, slots=True)
class DType:
    """One row of the dtype table.

    Args:
        name: safetensors' name, such as `"BF16"`.
        bits: size of one element; 4 and 6 for packed formats.
        kind: `"float"`, `"int"`, `"uint"`, `"bool"` or `"complex"`.
        torch: torch's attribute of the same dtype, or None where torch has none.
        significand, exponent: bits of a float's significand (hidden bit included) and exponent.
        safetensors: whether the safetensors format has it.
    """

    name: str
    bits: int
    kind: str
    torch: str | None
    significand: int = 0
    exponent: int = 0
    safetensors: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes an element takes, at least 1 (packed formats share bytes)."""
        return max(1, self.bits // 8)


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("BOOL", 8, "bool", "bool"),
        DType("F4", 4, "float", "float4_e2m1fn_x2", 2, 2),
        DType("F6_E2M3", 6, "float", None, 4, 2),
        DType("F6_E3M2", 6, "float", None, 3, 3),
        DType("U8", 8, "uint", "uint8"),
        DType("I8", 8, "int", "int8"),
        DType("F8_E5M2", 8, "float", "float8_e5m2", 3, 5),
        DType("F8_E4M3", 8, "float", "float8_e4m3fn", 4, 4),
        DType("F8_E8M0", 8, "float", "float8_e8m0fnu", 1, 8),
        DType("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz", 4, 4),
        DType("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz", 3, 5),
        DType("I16", 16, "int", "int16"),
        DType("U16", 16, "uint", "uint16"),
        DType("F16", 16, "float", "float16", 11, 5),
        DType("BF16", 16, "float", "bfloat16", 8, 8),
        DType("I32", 32, "int", "int32"),
        DType("U32", 32, "uint", "uint32"),
        DType("F32", 32, "float", "float32", 24, 8),
        DType("C64", 64, "complex", "complex64", 24, 8),
        DType("F64", 64, "float", "float64", 53, 11),
        DType("I64", 64, "int", "int64"),
        DType("U64", 64, "uint", "uint64"),
        DType("C32", 32, "complex", "complex32", 11, 5, safetensors=False),
        DType("C128", 128, "complex", "complex128", 53, 11, safetensors=False),
    )
}

_BY_TORCH = {d.torch: d.name for d in DTYPES.values() if d.torch}
_SHORT = {"half": "F16", "float": "F32", "double": "F64", "long": "I64", "int": "I32", "fp8": "F8_E4M3"}


def dtype_name(dtype: Any) -> str:
    """The safetensors name of a dtype given by that name, by torch's, or as a torch dtype.

    >>> dtype_name("BF16"), dtype_name("bf16"), dtype_name("bfloat16"), dtype_name("fp32"), dtype_name("torch.int64")
    ('BF16', 'BF16', 'BF16', 'F32', 'I64')
    """
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    text = str(dtype).removeprefix("torch.")
    if text in _BY_TORCH:
        return _BY_TORCH[text]
    upper = text.upper()
    for candidate in (upper, upper.replace("FP", "F", 1)):
        if candidate in DTYPES:
            return candidate
    if text in _SHORT:
        return _SHORT[text]
    known = {name.lower(): name for name in (*DTYPES, *_BY_TORCH, *_SHORT)}
    near = get_close_matches(text.lower(), known, 1)
    meant = (Remedy("dtype", {str(dtype): known[near[0]]}, kind="instead"),) if near else ()
    advice = "one of " + ", ".join(DTYPES)
    raise CheckpointError(Diagnostic("unknown-dtype", f"no dtype is called {text!r}", remedies=meant, advice=advice))


def is_lossless(source: str, target: str) -> bool:
    """Whether every value of dtype `source` can be held by dtype `target`.

    >>> is_lossless("BF16", "F32"), is_lossless("F64", "F32"), is_lossless("I64", "F32"), is_lossless("BF16", "F16")
    (True, False, False, False)
    """
    if source == target:
        return True
    a, b = DTYPES[source], DTYPES[target]
    if {a.kind, b.kind} <= {"float", "complex"}:
        if a.kind == "complex" and b.kind == "float":
            return False
        scale_only = "F8_E8M0" in (source, target) or "FNUZ" in source or "FNUZ" in target
        return not scale_only and a.significand <= b.significand and a.exponent <= b.exponent and a.bits < b.bits
    if a.kind == "bool":
        return b.kind in ("int", "uint")
    if a.kind == "uint":
        return b.kind in ("uint", "int") and a.bits < b.bits
    return a.kind == b.kind == "int" and a.bits < b.bits


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one tensor.

    >>> spec = TensorSpec([2, 3], "BF16")
    >>> spec, spec.numel, spec.nbytes, str(spec)
    (TensorSpec(shape=(2, 3), dtype='BF16'), 6, 12, 'BF16 [2, 3]')

    Args:
        shape: non-negative integers, `()` for a scalar.
        dtype: a safetensors name (`"F32"`), a torch name (`"float32"`) or a torch dtype; kept as the safetensors name.

    Raises:
        CheckpointError: unknown dtype, or a shape that is none.
    """

    shape: tuple[int, ...]
    dtype: str
    numel: int = field(init=False, repr=False, compare=False)

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        dims = tuple(shape)
        for n in dims:
            if not isinstance(n, int) or n < 0:
                raise CheckpointError(Diagnostic("bad-shape", f"{list(dims)!r} is no shape"))
        object.__setattr__(self, "shape", dims)
        object.__setattr__(self, "dtype", dtype if dtype in DTYPES else dtype_name(dtype))
        object.__setattr__(self, "numel", math.prod(dims))

    @property
    def nbytes(self) -> int:
        """Bytes the elements take when stored densely; packed dtypes round up."""
        return (self.numel * DTYPES[self.dtype].bits + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True, repr=False)
class Tie:
    """Names of one and the same tensor.

    >>> print(Tie(("wte.weight", "lm_head.weight"), "alias"))
    wte.weight = lm_head.weight (alias)

    Args:
        names: two or more, in the order of the checkpoint or the state dict.
        kind: in a checkpoint `"storage"` where the names share bytes, `"alias"` where the metadata declares them; in a
            model `"object"` for one parameter under several names, `"storage"` for several tensors over the same
            storage, offset, shape and stride, `"declared"` where the model's class and config say so and the tensors
            are still apart.
    """

    names: tuple[str, ...]
    kind: str

    def __str__(self) -> str:
        return f"{' = '.join(self.names)} ({self.kind})"

    def __repr__(self) -> str:
        return brief("Tie", listed(self.names, 6), self.kind)


MOST_DIMENSIONS = 64  # of numpy, and of torch's loops over elements
_LIMIT = 1 << 63


def shape_problem(shape: Sequence[int], bits: int) -> str | None:
    """Why a shape of non-negative integers is absurd for elements of so many bits; None if it is not.

    >>> shape_problem([2, 3], 32), shape_problem([1 << 62, 0, 4], 32)
    (None, 'has the shape [4611686018427387904, 0, 4], whose size does not fit 64 bits')
    """
    if len(shape) > MOST_DIMENSIONS:
        return f"has {len(shape):,} dimensions; {MOST_DIMENSIONS} is the limit"
    # A zero does not save an absurd shape: strides are products of the other sizes.
    total = bits
    for n in shape:
        total *= n or 1
        if total >= _LIMIT:
            digits = [n if n < _LIMIT else f"2^{n.bit_length() - 1}" for n in shape]
            return f"has the shape [{', '.join(map(str, digits))}], whose size does not fit 64 bits"
    return None
