"""Quantised codes that would come in as weights: without their scales they are numbers of another size altogether.

A tensor of FP8, or of 8-bit integers with scales beside it, is a code. It is a weight only once an op has multiplied
it by its scales; a cast alone would make a model that loads and computes nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import Diagnostic
from ..language.folding import fold
from ..language.patterns import listed, patterns_of
from ..specs import DTYPES, TensorSpec
from ..wording import counted

__all__ = ["Code", "codes_as_weights", "unscaled"]

Specs = Mapping[str, TensorSpec]
_SCALE = re.compile(r"(?i)(?:^|[._])(?:scales?|scb|absmax)(?:$|[._])")


@dataclass(frozen=True)
class Code:
    """A tensor of codes on its way into a float parameter.

    Args:
        dtype: what it is stored as. wants: what the model has.
        scales: the source keys beside it that scale it.
    """

    dtype: str
    wants: str
    scales: tuple[str, ...]

    def __str__(self) -> str:
        beside = f", and is scaled by {self.scales[0]!r}" if self.scales else ", and nothing beside it scales it"
        return f"{self.dtype} codes{beside}"


def codes_as_weights(
    made: Mapping[str, str], origins: Mapping[str, tuple[str, ...]], target: Specs, source: Specs, dtype: str
) -> dict[str, Code]:
    """The codes that would come into float parameters as they are.

    Args:
        made: the model's keys -> the dtype of what the source offers for each.
        origins: the source keys behind each. source: all that the source holds.
        dtype: the policy; "model" and "source" ask for a cast of FP8 aloud, which is heeded where no scale is lost.
    """
    found: dict[str, Code] = {}
    beside: dict[str, list[str]] | None = None
    for key, have in made.items():
        kind = DTYPES[have]
        if kind.bits > 8 or kind.kind == "bool" or key not in target or not _is_float(target[key].dtype):
            continue
        if beside is None:
            beside = _scales(source)
        behind = origins.get(key, ())
        scales = tuple(dict.fromkeys(s for k in behind for s in _of(k, beside) if s not in behind))
        if scales or (kind.kind == "float" and dtype not in ("model", "source")):
            found[key] = Code(have, target[key].dtype, scales)
    return found


def _is_float(dtype: str) -> bool:
    return DTYPES[dtype].kind == "float" and DTYPES[dtype].bits > 8


def _scales(source: Iterable[str]) -> dict[str, list[str]]:
    """Every path above a key that is called a scale -> these keys; nearly all of a checkpoint's keys are not."""
    found: dict[str, list[str]] = {}
    for key in source:
        path, _, leaf = key.rpartition(".")
        if _SCALE.search(leaf):
            found.setdefault(path, []).append(key)
    return found


def _of(key: str, beside: Mapping[str, list[str]]) -> list[str]:
    """The scales of one tensor: below its own name, or beside it and called after it or after nothing."""
    path, _, leaf = key.rpartition(".")
    names = [k for k in beside.get(path, ()) if k != key]
    named = [k for k in names if k.rpartition(".")[2].startswith(leaf)]
    return [*beside.get(key, ()), *(named or [k for k in names if leaf in ("weight", "qweight")])]


def unscaled(codes: Mapping[str, Code], made: Specs, origins: Mapping[str, tuple[str, ...]]) -> list[Diagnostic]:
    """The problem of codes that would come in as weights, with the rules that scale them where there are such."""
    rules: list[str] = []
    others: list[str] = []
    by_form: dict[tuple[str, str, str], list[str]] = {}
    for key, code in codes.items():
        scale = _offered(code, made, origins)
        block = _block(made[key], made[scale]) if scale and key in made and made[key].dtype.startswith("F8") else None
        if block is None or scale is None or not scale.startswith(key):
            others.append(key)
        else:
            by_form.setdefault((scale[len(key) :], block, code.wants), []).append(key)
    for (suffix, block, wants), keys in by_form.items():
        dtype = "" if wants in ("BF16", "F32") else f", dtype='{wants}'"
        rules += [f"{p}, {p}{suffix} -> {p} | fp8_dequant({block}{dtype})" for p in patterns_of(keys, made)]
    left = listed(patterns_of(others, made))
    helps = [f'recipe=cs.Recipe([{listed(rules)}], rest="keep") scales them'] if rules else []
    helps += [f"dequantise where the file was written, or keep=[{left}] leaves these as they are"] if others else []
    by_kind: dict[str, list[str]] = {}
    for key, code in codes.items():
        by_kind.setdefault(code.dtype, []).append(key)
    lines = [f"{text}  {codes[keys[0]]}" for keys in by_kind.values() for text, _ in fold(keys)[:6]]
    return [
        Diagnostic(
            "unscaled-codes",
            f"{counted(len(codes), 'tensor', 'holds')} quantised codes, which are no weights until they are scaled",
            notes=tuple(lines[:12]),
            help="; ".join(helps),
        )
    ]


def _offered(code: Code, made: Specs, origins: Mapping[str, tuple[str, ...]]) -> str | None:
    """The scale under the name that it has beside the model's keys."""
    return next((k for k in made if origins.get(k, ())[:1] == code.scales[:1]), None) if code.scales else None


def _block(weight: TensorSpec, scale: TensorSpec) -> str | None:
    """The size of the blocks that share a scale, as `fp8_dequant` takes it, where the shapes show one."""
    if len(weight.shape) < 2 or len(scale.shape) != len(weight.shape) or 0 in scale.shape:
        return None
    sides = list(zip(weight.shape[-2:], scale.shape[-2:]))
    for block in ((128, 128), tuple(-(-n // s) for n, s in sides)):
        if all(-(-n // b) == s for (n, s), b in zip(sides, block)):
            return f"block={block[0]}" if block[0] == block[1] else f"block=[{block[0]}, {block[1]}]"
    return None
