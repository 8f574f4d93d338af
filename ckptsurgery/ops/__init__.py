"""The value ops: small frozen objects that infer specs without torch, run on tensors, and invert where they can."""

from __future__ import annotations

from . import (
    angles,
    arithmetic,
    blending,
    consensus,
    convolutions,
    factoring,
    folding_norms,
    indexing,
    low_rank,
    merging,
    over_axes,
    positions,
    row_sums,
    rows,
)
from .base import Op, OpError, Specs, Tensors
from .quantised import floats, fourbit, gguf_blocks, packed, quantising
from .registry import make_op, op, op_names, op_signature, op_summary

# Importing a module of ops registers them.
_BUILT_IN = (
    angles,
    arithmetic,
    blending,
    consensus,
    convolutions,
    factoring,
    folding_norms,
    indexing,
    low_rank,
    merging,
    over_axes,
    positions,
    row_sums,
    rows,
)
_QUANTISED = (floats, fourbit, gguf_blocks, packed, quantising)

__all__ = ["Op", "OpError", "Specs", "Tensors", "make_op", "op", "op_names", "op_signature", "op_summary"]
