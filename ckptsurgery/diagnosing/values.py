"""What only the elements show: NaN, Inf, constants, denormals, and tensors that are equal and not tied."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import Diagnostic
from ..language.captures import escape
from ..specs import DTYPES, TensorSpec
from ..storage.checkpoint import Checkpoint
from ..wording import counted
from .conversions import conversion
from .file_checks import shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ValueSurvey", "value_findings"]

_BLOCK = 1 << 22
_FEW = 16  # elements: a tensor of fewer is constant or equal to another by chance
_MANY_DENORMALS = 0.01  # of the elements


@dataclass(slots=True)
class _Seen:
    """What one pass over a tensor's elements found."""

    nans: int = 0
    infinite: int = 0
    positive_infinite: int = 0
    denormal: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    constant: bool = True


@dataclass(slots=True)
class ValueSurvey:
    """One pass over all elements, a block at a time; tied tensors are read once."""

    seen: dict[str, _Seen] = field(default_factory=dict)
    equal: dict[tuple[TensorSpec, bytes], list[str]] = field(default_factory=dict)

    def take(self, checkpoint: Checkpoint, moved: Callable[[int], object]) -> None:
        """Read everything.

        Raises:
            CheckpointError: a file ends early, or changed.
        """
        repeated = {name for tie in checkpoint.ties for name in tie.names[1:]}
        for key, spec in checkpoint.specs.items():
            if key in repeated or not spec.numel:
                continue
            digest, seen, first = hashlib.blake2b(digest_size=16), _Seen(), None
            size = DTYPES[spec.dtype].itemsize
            for start in range(0, spec.nbytes, _BLOCK // size * size):
                block = checkpoint.read(key, start, min(start + _BLOCK // size * size, spec.nbytes))
                digest.update(block)
                first = bytes(block[:size]) if first is None else first
                seen.constant = seen.constant and bytes(block) == first * (len(block) // size)
                _examine(block, spec, key, seen)
                moved(len(block))
            self.seen[key] = seen
            self.equal.setdefault((spec, digest.digest()), []).append(key)


def _examine(block: bytes | bytearray | memoryview, spec: TensorSpec, key: str, seen: _Seen) -> None:
    kind = DTYPES[spec.dtype]
    if kind.kind not in ("float", "complex") or kind.bits < 8 or kind.torch is None:
        return
    import torch

    from ..storage.tensors import torch_dtype

    dtype = torch_dtype(spec.dtype, key)
    values = torch.frombuffer(bytearray(block), dtype=torch.uint8).view(dtype)
    values = torch.view_as_real(values).flatten() if dtype.is_complex else values
    if values.element_size() == 1 or spec.dtype == "C32":
        values = values.to(torch.float32)
    _count(values, seen, _smallest_normal(spec.dtype))


def _smallest_normal(dtype: str) -> float:
    import torch

    exact = {"F64": torch.float64, "C128": torch.float64, "F32": torch.float32, "C64": torch.float32,
             "BF16": torch.bfloat16, "F16": torch.float16}.get(dtype)  # fmt: skip
    return float(torch.finfo(exact).smallest_normal) if exact else 0.0  # formats of 8 bits live on their denormals


def _count(values: Tensor, seen: _Seen, normal: float) -> None:
    finite = values.isfinite()
    if not bool(finite.all()):
        seen.nans += int(values.isnan().sum())
        seen.infinite += int(values.isinf().sum())
        seen.positive_infinite += int(values.isposinf().sum())
        values = values[finite]
    if normal:
        size = values.abs()
        seen.denormal += int(((size < normal) & (size > 0)).sum())
    if values.numel():
        low, high = values.aminmax()
        seen.low, seen.high = min(seen.low, float(low)), max(seen.high, float(high))


def value_findings(survey: ValueSurvey, checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """Findings from a survey."""
    specs, seen, place = checkpoint.specs, survey.seen, checkpoint.source

    def finding(code: str, noun: str, says: str, keys: list[str], help: str, severity: str) -> Iterator[Diagnostic]:
        if keys:
            verb, _, what = says.partition(" ")
            headline = f"{counted(len(keys), noun, verb)} {what}"
            yield Diagnostic(code, headline, place, shown(keys), help=help, severity=severity)

    nan = [f"{key}  {s.nans:,} of {specs[key].numel:,}" for key, s in seen.items() if s.nans]
    yield from finding("nan", "tensor", "holds NaN", nan, "go back to an earlier checkpoint: training broke", "error")
    masks = [
        key for key, s in seen.items() if s.infinite and not (s.positive_infinite or s.nans) and s.low == s.high == 0
    ]
    infinite = [key for key, s in seen.items() if s.infinite and key not in masks]
    help = "it overflowed, in training or in a cast: go back to the wider dtype, such as bf16 instead of fp16"
    yield from finding("inf", "tensor", "holds infinities", infinite, help, "error")
    help = "attention masks are made by the model: drop them"
    yield from finding("mask", "tensor", "consists of 0 and -inf: a mask", masks, help, "note")

    constant = [key for key, s in seen.items() if s.constant and specs[key].numel >= _FEW and _is_float(specs[key])]
    dead = [key for key in constant if seen[key].high == 0 and len(specs[key].shape) > 1]
    help = "was it ever trained or loaded? a low-rank adapter's second factor starts so"
    yield from finding("dead-tensor", "matrix", "is all zeros", dead, help, "warning")
    level = [key for key in constant if seen[key].high != 0 and len(specs[key].shape) > 1 and not seen[key].nans]
    yield from finding("constant-tensor", "matrix", "holds one value alone", level, "was it ever trained?", "warning")
    vectors = [key for key in constant if len(specs[key].shape) < 2]
    help = "biases of 0 and norms of 1 are where training starts: fine if they never were trained"
    yield from finding("constant-vector", "vector", "holds one value alone", vectors, help, "note")
    few = [key for key, s in seen.items() if s.denormal > _MANY_DENORMALS * specs[key].numel]
    help = "they are slow on some machines and flushed to zero on others; a wider dtype, or zero"
    yield from finding("denormals", "tensor", "has more than 1% denormal numbers", few, help, "warning")
    yield from _twins(survey, checkpoint, set(constant))


def _config_ties(survey: ValueSurvey, checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """Matrices of a row for each word that the config says are one, and that are not."""
    config = checkpoint.config or {}
    words = config.get("vocab_size")
    if config.get("tie_word_embeddings") is not True or type(words) is not int or words < _FEW:
        return
    matrices: dict[TensorSpec, list[str]] = {}
    for (spec, _), keys in survey.equal.items():
        if len(spec.shape) == 2 and spec.shape[0] >= words > spec.shape[1] and _is_float(spec):
            matrices.setdefault(spec, []).append(keys[0])
    for keys in matrices.values():
        if len(keys) > 1:
            yield Diagnostic(
                "ties-differ",
                f"the config ties the word embeddings, but {len(keys)} matrices of them are stored, and differ",
                checkpoint.source,
                shown(keys),
                help='is "tie_word_embeddings" meant? loading takes one of them for all; drop the others',
                severity="warning",
            )


def _is_float(spec: TensorSpec) -> bool:
    return DTYPES[spec.dtype].kind == "float"


def _twins(survey: ValueSurvey, checkpoint: Checkpoint, constant: set[str]) -> Iterator[Diagnostic]:
    """Tensors with equal bytes that are stored apart: ties that were lost, or buffers that every layer repeats."""
    place = checkpoint.source
    groups = [
        keys
        for (spec, _), keys in survey.equal.items()
        if len(keys) > 1 and spec.numel >= _FEW and _is_float(spec) and keys[0] not in constant
    ]
    lost = [keys for keys in groups if len(checkpoint.specs[keys[0]].shape) > 1]
    if lost:
        kept, alias = lost[0][:2]
        spare = sum(checkpoint.specs[key].nbytes for keys in lost for key in keys[1:])
        yield Diagnostic(
            "lost-tie",
            f"{counted(len(lost), 'group')} of matrices equal bit for bit and stored apart: {spare:,} bytes twice",
            place,
            tuple(" = ".join(keys[:4]) for keys in lost[:8]),
            remedies=(
                conversion("ties them, if the model does", drop=[escape(alias)], tie={escape(alias): escape(kept)}),
            ),
            severity="warning",
        )
    yield from _config_ties(survey, checkpoint)
    vectors = [keys for keys in groups if len(checkpoint.specs[keys[0]].shape) < 2]
    if vectors:
        yield Diagnostic(
            "repeated-vector",
            f"{counted(len(vectors), 'vector', 'is')} stored more than once, equal bit for bit",
            place,
            tuple(f"{len(keys)} x {keys[0]}" for keys in vectors[:8]),
            help="buffers that a model computes by itself, such as frequencies, can be dropped",
            severity="note",
        )
    for alias, kept in checkpoint.metadata.items():
        both = alias != "format" and alias in checkpoint.entries and kept in checkpoint.entries
        if both and not any(
            {alias, kept} <= set(keys) for keys in (*survey.equal.values(), *(t.names for t in checkpoint.ties))
        ):
            yield Diagnostic(
                "ties-differ",
                f"the metadata says that {alias!r} is {kept!r}, but both are stored, and differ",
                place,
                remedies=tuple(conversion(f"takes {k!r}", drop=[escape(d)]) for k, d in ((kept, alias), (alias, kept))),
            )
