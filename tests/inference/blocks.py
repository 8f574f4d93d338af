"""A transformer's block as two codebases name it."""

from __future__ import annotations

import ckptsurgery as cs

OURS = {
    "ln_1.weight": (16,), "attn.q.weight": (16, 16), "attn.k.weight": (8, 16), "attn.v.weight": (8, 16),
    "attn.o.weight": (16, 16), "ln_2.weight": (16,), "mlp.w1.weight": (24, 16), "mlp.w3.weight": (24, 16),
    "mlp.w2.weight": (16, 24),
}  # fmt: skip
THEIRS = {
    "input_norm.weight": (16,), "self_attn.qkv.weight": (32, 16), "self_attn.out.weight": (16, 16),
    "post_norm.weight": (16,), "ff.gate_up.weight": (48, 16), "ff.down.weight": (16, 24),
}  # fmt: skip


def spec(*shape: int) -> cs.TensorSpec:
    return cs.TensorSpec(shape, "F32")


def block(names: dict[str, tuple[int, ...]], prefix: str, count: int) -> dict[str, cs.TensorSpec]:
    return {f"{prefix}{i}.{n}": spec(*s) for i in range(count) for n, s in names.items()}
