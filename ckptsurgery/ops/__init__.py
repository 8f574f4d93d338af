"""The value ops: small frozen objects that infer specs without torch, run on tensors, and invert where they can."""

from __future__ import annotations

from . import (
    arithmetic,
    axes,
    blending,
    consensus,
    convolutions,
    folding_norms,
    indexing,
    low_rank,
    merging,
    positions,
    rows,
)
from .base import Op, OpError, Specs, Tensors
from .registry import make_op, op_names, op_signature, op_summary, register

# Importing a module of ops registers them.
_BUILT_IN = (
    arithmetic,
    axes,
    blending,
    consensus,
    convolutions,
    folding_norms,
    indexing,
    low_rank,
    merging,
    positions,
    rows,
)

__all__ = ["Op", "OpError", "Specs", "Tensors", "make_op", "op_names", "op_signature", "op_summary", "register"]
