"""Quantised weights by their names: the bits of a code, the format, the group of a scale, the shape of the weight.

A format is recognised by the names of the tensors that belong to one weight, and by the op that takes them. Tensors
that the op would refuse are listed as the tensors that they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ..ops.base import OpError, SourceNote
from ..ops.quantised.scales import scale_grid
from ..ops.registry import make_op
from ..specs import TensorSpec

__all__ = ["CODED", "PackedWeight", "packed_weights"]

Notes = Callable[[str], SourceNote]


class PackedWeight(NamedTuple):
    """A quantised weight.

    Args:
        text: its description, such as `4-bit GPTQ, group 128, of [4096, 4096]`.
        op: the text of the op that turns it into floats.
        keys: of its tensors, the codes first.
    """

    text: str
    op: str
    keys: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The description without the shape."""
        return self.text.partition(", of [")[0]


class _PackedNames(NamedTuple):
    """The tensors of one weight.

    Args:
        title: of the format. op: its text. names: what is behind the weight's own name, the codes first, with `?` in
            front of a name that may be absent. scale: the place of the scales among the names.
    """

    title: str
    op: str
    names: tuple[str, ...]
    scale: int = 1


_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = ("?weight.nested_absmax", "?weight.nested_quant_map")
_LAYOUTS = (
    _PackedNames("GPTQ", "gptq_dequant", ("qweight", "qzeros", "scales", "?g_idx"), 2),
    _PackedNames("AWQ", "awq_dequant", ("qweight", "qzeros", "scales"), 2),
    _PackedNames("NVFP4", "nvfp4_dequant", ("weight_packed", "weight_scale", "weight_global_scale")),
    _PackedNames("NVFP4", "nvfp4_dequant", ("weight", "weight_scale", "weight_scale_2")),
    _PackedNames("MXFP4", "mxfp4_dequant", ("weight_packed", "weight_scale")),
    _PackedNames(
        "packed integers", "packed_dequant", ("weight_packed", "weight_scale", "?weight_zero_point", "weight_shape")
    ),
    _PackedNames(
        "bitsandbytes nf4", "nf4_dequant", ("weight", "weight.absmax", "weight.quant_map", *_NESTED, f"{_STATE}nf4")
    ),
    _PackedNames(
        "bitsandbytes fp4", "nf4_dequant", ("weight", "weight.absmax", "weight.quant_map", *_NESTED, f"{_STATE}fp4")
    ),
    _PackedNames("bitsandbytes", "int8_dequant(absmax=true)", ("weight", "SCB")),
    _PackedNames("FP8", "fp8_dequant", ("weight", "weight_scale_inv")),
    _PackedNames("FP8", "fp8_dequant", ("weight", "weight_scale")),
    _PackedNames("integers", "int8_dequant", ("weight", "weight_scale", "?weight_zero_point")),
)
_EXPERTS = _PackedNames("MXFP4", "mxfp4_dequant", ("_blocks", "_scales"))


def packed_weights(specs: Mapping[str, TensorSpec], notes: Notes, blocks: Mapping[str, str]) -> dict[str, PackedWeight]:
    """Return, for each quantised weight, the key of its codes -> the weight.

    >>> specs = {"qweight": TensorSpec([512, 4096], "I32"), "qzeros": TensorSpec([32, 512], "I32")}
    >>> specs = {f"m.{name}": spec for name, spec in (specs | {"scales": TensorSpec([32, 4096], "F16")}).items()}
    >>> packed_weights(specs, lambda key: SourceNote(), {})["m.qweight"].text
    '4-bit GPTQ, group 128, of [4096, 4096]'

    Args:
        notes: gives facts about a tensor beside its spec.
        blocks: key -> the type of its blocks, in a format that has such types.
    """
    found: dict[str, PackedWeight] = {}
    for key, spec in specs.items():
        if not spec.dtype.startswith(CODED):
            continue
        for layout, keys in _in_blocks(key, blocks[key]) if key in blocks else _candidates(key, specs):
            text = _described(layout, keys, specs, notes)
            if text:
                found[key] = PackedWeight(text, layout.op, keys)
                break
    return found


def _in_blocks(key: str, kind: str) -> Iterator[tuple[_PackedNames, tuple[str, ...]]]:
    yield _PackedNames(f"{kind} blocks", f"gguf_dequant({kind})", ("",)), (key,)


def _candidates(key: str, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[_PackedNames, tuple[str, ...]]]:
    """The layouts for whose codes a key may stand, with the keys of one weight."""
    stem, dot, last = key.rpartition(".")
    for layout in _LAYOUTS if last in _CODES else ():
        keys = tuple(f"{stem}{dot}{name.lstrip('?')}" for name in layout.names)
        there = tuple(k for k, name in zip(keys, layout.names) if k in specs or not name.startswith("?"))
        if last == layout.names[0] and all(k in specs for k in there):
            yield layout, there
    if key.endswith(_EXPERTS.names[0]):
        scales = key.removesuffix(_EXPERTS.names[0]) + _EXPERTS.names[1]
        if scales in specs:
            yield _EXPERTS, (key, scales)


_CODES = {layout.names[0] for layout in _LAYOUTS}
CODED = ("F8", "F4", "I8", "U8", "I32")
"""Dtypes of codes."""


def _described(
    layout: _PackedNames, keys: tuple[str, ...], specs: Mapping[str, TensorSpec], notes: Notes
) -> str | None:
    given = tuple(map(specs.__getitem__, keys))
    if given[0].numel == 0 or (layout.title == "FP8" and not given[0].dtype.startswith("F8")):
        return None
    name, _, arguments = layout.op.partition("(")
    try:
        kind = (arguments.rstrip(")"),) if name == "gguf_dequant" else ()
        op = make_op(name, kind, {"absmax": True} if "absmax" in arguments else {})
        if op.reads_ahead and not kind:
            told = tuple(notes(keys[place]) for place in op.reads_ahead)
            if all(note.content is None for note in told):
                return f"4-bit {layout.title}" if layout.op == "nf4_dequant" else layout.title
            op = op.told(told)
        (made,) = op.infer(given)
    except OpError:
        return None
    if made.numel == 0 or not made.shape:
        return None
    if kind:
        return f"{layout.title}, of {list(made.shape)}"
    bits = "" if layout.title == "FP8" else f"{given[0].nbytes * 8 // made.numel}-bit "
    return f"{bits}{layout.title}, {_granularity(layout, given, made)}, of {list(made.shape)}"


def _granularity(layout: _PackedNames, given: tuple[TensorSpec, ...], made: TensorSpec) -> str:
    """The words for the elements that share a scale."""
    scales, rows = given[layout.scale].numel, made.numel // made.shape[-1]
    if layout.op.startswith("nf4"):
        return f"blocks of {made.numel // scales}"
    if scales == rows or (scales > rows and made.numel % scales == 0):
        return "channel" if scales == rows else f"group {made.numel // scales}"
    return str(scale_grid(make_op("fp8_dequant"), made, given[layout.scale], None))
