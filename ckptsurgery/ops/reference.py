"""The reference of ops, made from their docstrings: formula, arguments, exactness, inverse, and a rule that runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

from .base import Op
from .registry import find_op, op_names, op_signature, op_summary

__all__ = ["OpReference", "describe", "reference"]

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]

_PAIR: Shapes = {"a/w": ("F32", (4, 6)), "b/w": ("F32", (4, 6))}
_THREE: Shapes = {**_PAIR, "c/w": ("F32", (4, 6))}
_TABLE: Shapes = {"w": ("F32", (4, 6))}
_NORM: Shapes = {"g": ("F32", (4, 1)), "v": ("F32", (4, 6))}
_FP8: Shapes = {"w": ("F8_E4M3", (256, 128)), "w_scale_inv": ("F32", (2, 1))}
_PACKED: Shapes = {"w_packed": ("I32", (0, 8)), "w_scale": ("BF16", (0, 1)), "w_shape": ("I64", (2,))}
_NF4: Shapes = {"w": ("U8", (0, 1)), "w_absmax": ("F32", (0,)), "w_map": ("F32", (16,)), "w_state": ("U8", (90,))}
_NVFP4: Shapes = {"w": ("U8", (4, 16)), "w_scale": ("F8_E4M3", (4, 2)), "w_global": ("F32", (1,))}
_GPTQ: Shapes = {"qweight": ("I32", (16, 64)), "qzeros": ("I32", (1, 8)), "scales": ("F16", (1, 64))}
_AWQ: Shapes = {"qweight": ("I32", (128, 8)), "qzeros": ("I32", (1, 8)), "scales": ("F16", (1, 64))}
_LORA: Shapes = {"w": ("BF16", (8, 6)), "A": ("F32", (2, 6)), "B": ("F32", (8, 2))}
_EXPERTS: Shapes = {"w": ("BF16", (4, 8, 6)), "A": ("F32", (8, 6)), "B": ("F32", (8, 8))}
_BATCH: Shapes = {"w": ("F32", (4, 3, 2, 2)), **dict.fromkeys(("gamma", "beta", "mean", "var"), ("F32", (4,)))}
_MERGE = "a/{k...}, b/{k...}, c/{k...} -> {k...} | "
_BLEND = "a/{k...}, b/{k...} -> {k...} | "

EXAMPLES: Mapping[str, tuple[str, Shapes]] = {
    "adapt_input_conv": ("w -> w | adapt_input_conv(1)", {"w": ("F32", (8, 3, 4, 4))}),
    "add": ("w -> w | add(1)", _TABLE),
    "apply": (f"{_BLEND}apply(0.5)", _PAIR),
    "awq_dequant": ("qweight, qzeros, scales -> weight | awq_dequant", _AWQ),
    "block_diagonal": ("a, b -> w | block_diagonal", {"a": ("F32", (8, 2)), "b": ("F32", (4, 3))}),
    "breadcrumbs": (f"{_MERGE}breadcrumbs(0.9, gamma=0.01)", _THREE),
    "cast": ("w -> w | cast(bf16)", _TABLE),
    "dare": (f"{_MERGE}dare(0.5)", _THREE),
    "della": (f"{_MERGE}della(0.5, epsilon=0.1)", _THREE),
    "diff": (f"{_BLEND}diff", _PAIR),
    "dora_merge": ("w, A, B, m -> w | dora_merge(alpha=16)", {**_LORA, "m": ("F32", (8,))}),
    "combine_rows": ("w -> w | combine_rows(2, [0, 1, 1], [3, 0, 2], [1, 0.25, 0.75])", _TABLE),
    "drop_rows": ("w [o i] -> w [o i] | drop_rows([1, 3], axis=i)", _TABLE),
    "ema": (f"{_BLEND}ema(0.999)", _PAIR),
    "fold_batchnorm": ("w, gamma, beta, mean, var -> w, b | fold_batchnorm", _BATCH),
    "fold_weight_norm": ("g, v -> w | fold_weight_norm", _NORM),
    "fp8_dequant": ("w, w_scale_inv -> w | fp8_dequant(block=128)", _FP8),
    "fp8_quant": ("w -> w, w_scale | fp8_quant(per=channel)", _TABLE),
    "gguf_dequant": ("w -> w | gguf_dequant(Q4_K)", {"w": ("U8", (4, 288))}),
    "gguf_quant": ("w -> w | gguf_quant", {"w": ("F32", (4, 64))}),
    "gptq_dequant": ("qweight, qzeros, scales -> weight | gptq_dequant", _GPTQ),
    "inflate": ("w -> w | inflate(3)", {"w": ("F32", (8, 3, 4, 4))}),
    "insert_rows": ("w -> w | insert_rows([0, 5])", _TABLE),
    "int8_dequant": ("w, w_scale -> w | int8_dequant", {"w": ("I8", (4, 6)), "w_scale": ("F32", (4, 1))}),
    "int8_quant": ("w -> w, w_scale | int8_quant", _TABLE),
    "karcher": (f"{_MERGE}karcher", _THREE),
    "lerp": (f"{_BLEND}lerp(0.3)", _PAIR),
    "lora_add": ("w, A, B -> w | lora_add([0.5])", _LORA),
    "lora_merge": ("w, A, B -> w | lora_merge(alpha=16)", _LORA),
    "lora_merge_experts": ("w, A, B -> w | lora_merge_experts(alpha=16)", _EXPERTS),
    "mean_over": ("{m:a,b,c}/{k...} -> {k...} | mean_over(m)", _THREE),
    "model_stock": (f"{_MERGE}model_stock", _THREE),
    "mul": ("w -> w | mul(0.5)", _TABLE),
    "mxfp4_dequant": ("w, w_scale -> w | mxfp4_dequant", {"w": ("U8", (4, 32)), "w_scale": ("U8", (4, 2))}),
    "nf4_dequant": ("w, w_absmax, w_map, w_state -> w | nf4_dequant([0, 8], dtype=bf16)", _NF4),
    "low_rank": ("w -> b, a | low_rank(2)", _TABLE),
    "matmul": ("w, rotation -> w | matmul", {"w": ("F32", (8, 4)), "rotation": ("F32", (4, 4))}),
    "nuslerp": (f"{_BLEND}nuslerp(0.3)", _PAIR),
    "nvfp4_dequant": ("w, w_scale, w_global -> w | nvfp4_dequant", _NVFP4),
    "packed_dequant": ("w_packed, w_scale, w_shape -> w | packed_dequant(columns=64)", _PACKED),
    "pad_to_multiple": ("w -> w | pad_to_multiple(64)", _TABLE),
    "repeat_over": ("w [o i] -> {e:0,1}.w [o i] | repeat_over(e)", _TABLE),
    "resize_patch_embed": ("w -> w | resize_patch_embed([8, 8])", {"w": ("F32", (8, 3, 4, 4))}),
    "resize_pos_embed": ("w -> w | resize_pos_embed([4, 4], prefix=1)", {"w": ("F32", (1, 5, 8))}),
    "resize_rel_pos_bias": ("w -> w | resize_rel_pos_bias([4, 4])", {"w": ("F32", (25, 2))}),
    "resize_rows": ("w -> w | resize_rows(6, mean)", _TABLE),
    "same": ("a/w, b/w -> w | same", dict.fromkeys(_PAIR, ("I32", (0, 3)))),
    "scale_by": ("w, g -> w | scale_by", {"w": ("F32", (4, 6)), "g": ("F32", (6,))}),
    "slerp": (f"{_BLEND}slerp(0.3)", _PAIR),
    "slice_rows": ("w -> w | slice_rows(0, 3)", _TABLE),
    "sum_over": ("{m:a,b,c}/{k...} -> {k...} | sum_over(m, [0.2, 0.3, 0.5])", _THREE),
    "take": ("w [o i] -> w [o i] | take(i, [5, 0, 1])", _TABLE),
    "task_arithmetic": (f"{_MERGE}task_arithmetic(0.5)", _THREE),
    "ties": (f"{_MERGE}ties(0.2)", _THREE),
    "unfold_weight_norm": ("w -> g, v | unfold_weight_norm", _TABLE),
}
"""A rule that runs for each built-in op, with the tensors that it reads."""


@dataclass(frozen=True)
class OpReference:
    """The reference of an op: its signature, its text, and an example.

    Args:
        name, signature, summary: as a rule writes it, and in a line.
        text: the docstring without the summary and the doctest.
        takes: what the op is given. runs: on blocks of a tensor or on whole tensors.
        example: a rule that runs. reads: its source tensors.
    """

    name: str
    signature: str
    summary: str
    text: str
    takes: str
    runs: str
    example: str = ""
    reads: Shapes = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.signature, "", self.summary, "", *([self.text, ""] if self.text else [])]
        lines += [f"Takes: {self.takes}.", f"Runs: {self.runs}."]
        if self.example:
            tensors = ", ".join(f"{key} {dtype} {list(shape)}" for key, (dtype, shape) in self.reads.items())
            lines += ["", "Example:", "", f"    {self.example}", "", f"    with {tensors}"]
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """The reference as plain data."""
        return {
            "name": self.name,
            "signature": self.signature,
            "summary": self.summary,
            "text": self.text,
            "takes": self.takes,
            "runs": self.runs,
            "example": self.example,
        }


def describe(name: str) -> OpReference:
    """Return the reference of an op.

    >>> found = describe("lerp")
    >>> found.signature, found.takes, found.runs
    ('lerp(t, integers=error)', 'all sources of its side at once', 'in blocks of 1 MiB')

    Raises:
        OpError: no op has this name; the closest names are in the text.
    """
    cls = find_op(name)
    example, reads = EXAMPLES.get(name, ("", {}))
    return OpReference(name, op_signature(name), op_summary(name), _text(cls), _takes(cls), _runs(cls), example, reads)


def reference() -> tuple[OpReference, ...]:
    """Return the reference of every op, by name.

    >>> "take" in [found.name for found in reference()]
    True
    """
    return tuple(map(describe, op_names()))


def _text(cls: type[Op]) -> str:
    """The docstring of an op without its summary and its doctests."""
    paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[1:]
    return "\n\n".join(part for part in paragraphs if not part.lstrip().startswith(">>>"))


def _takes(cls: type[Op]) -> str:
    role, joins = (inspect.getattr_static(cls, name) for name in ("axis_role", "joins"))
    if isinstance(joins, property):
        return "all sources of its side at once, or the entries of the axis that its argument names"
    if isinstance(role, property):
        return "each tensor alone, along dim 0 or along the axis that its arguments name"
    if role is not None:
        reduced = "the entries of an axis or of a captured name, which the result lacks"
        return reduced if role == "reduce" else "each tensor alone; the rearrangement adds the axis"
    return "all sources of its side at once" if joins else "each tensor alone"


def _runs(cls: type[Op]) -> str:
    if inspect.getattr_static(cls, "elementwise") is not True:
        return "on whole tensors"
    return "in blocks of 1 MiB" + ("" if cls.surveys is Op.surveys else ", after passes over whole tensors")
