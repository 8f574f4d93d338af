"""AOA statements run on a state dict, by the rules that Paddle's engine documents: an oracle of a few lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from itertools import product

import torch

__all__ = ["run_statements"]

State = dict[str, torch.Tensor]
_MACROS = ("$LAYER_ID", "$EXPERT_ID")


def run_statements(statements: Sequence[str], state: State) -> State:
    """Return what the statements make of a state dict; keys that none names keep their names."""
    made: State = {}
    used: set[str] = set()
    for statement in (one for text in statements for one in _numbered(text, list(state))):
        sides, _, attribute = re.sub(r"\s", "", statement).partition(",axis=")
        sides, _, order = sides.partition(",permute=")
        left, right = (side.split(",") for side in sides.split("->"))
        left = [key for name in left for key in _starred(name, list(state))]
        used |= {key.removesuffix("^T") for key in left}
        if right == ["_"]:
            continue
        tensors = [state[k[:-2]].permute(*reversed(range(state[k[:-2]].dim()))) if k.endswith("^T") else state[k]
                   for k in left]  # fmt: skip
        if len(tensors) > 1:
            tensors = [torch.cat(tensors, int(attribute))]
        if order:
            tensors = [tensors[0].permute(*ast.literal_eval(order.strip('"')))]
        if len(right) > 1:
            size = tensors[0].shape[int(attribute)]
            assert size % len(right) == 0
            tensors = list(tensors[0].split(size // len(right), int(attribute)))
        made |= dict(zip(right, tensors))
    return {**{k: v for k, v in state.items() if k not in used}, **made}


def _numbered(text: str, keys: Sequence[str]) -> Iterator[str]:
    """A statement once for each combination of the numbers that the first name with macros has."""
    names = re.findall(r"[A-Za-z_][A-Za-z.$_*0-9]*", text)
    first = next((name for name in names if any(m in name for m in _MACROS)), None)
    if first is None:
        yield text
        return
    macros = [m for m in _MACROS if m in first]
    pattern = re.escape(first)
    for m in macros:
        pattern = pattern.replace(re.escape(m), rf"(?P<{m[1:]}>\d+)", 1)
    found = [match for key in keys if (match := re.fullmatch(pattern, key))]
    for values in product(*(sorted({int(match[m[1:]]) for match in found}) for m in macros)):
        assert all(m in name for m in macros for name in names if name not in ("axis", "permute", "T"))
        done = text
        for macro, number in zip(macros, values):
            done = done.replace(macro, str(number))
        yield done


def _starred(name: str, keys: Sequence[str]) -> list[str]:
    """The keys that a name with a star stands for, by their numbers."""
    if "*" not in name:
        return [name]
    before, after = name.split("*")
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    return sorted((k for k in keys if pattern.fullmatch(k)), key=lambda k: int(pattern.fullmatch(k)[1]))  # type: ignore[index]
