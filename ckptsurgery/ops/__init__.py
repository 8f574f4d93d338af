"""The value ops: small frozen objects that infer specs without torch, run on tensors, and invert where they can."""

from __future__ import annotations

from .base import Op, OpError, Specs, Tensors
from .registry import make_op, op, op_names, op_signature, op_summary

__all__ = ["Op", "OpError", "Specs", "Tensors", "make_op", "op", "op_names", "op_signature", "op_summary"]
