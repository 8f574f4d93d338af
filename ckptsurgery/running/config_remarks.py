"""Fields of a config that goes along, which the plan made otherwise: reported one by one.

A field is told where the source's headers agree with it and the result's do not. Where the source did not agree either,
nothing is known of the field's meaning, and nothing is said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import CheckpointError, Diagnostic
from ..planning.plan import Plan
from ..specs import DTYPES, TensorSpec, dtype_name
from ..wording import counted
from .layer_lists import NUMBER, entries_by_layer, has_number, is_layer_list

__all__ = ["as_warnings", "common_dtype", "config_remarks", "fields_of", "is_unpacked", "tied_otherwise"]

_PACKED = ("F8", "F6", "F4", "I8", "U8", "I32")  # dtypes of quantised weights: floats below 16 bits, packed integers
_LAYERS = re.compile(r"(^|_)(layers?|blocks|depth|experts)($|_)")
_SIZES = re.compile(r"size|dim|width|channels|embd|positions|d_model|d_ff|inner|labels|classes")


def config_remarks(config: Any, plan: Plan, aliases: Mapping[str, str], ties: Iterable[tuple[str, ...]]) -> list[str]:
    """One line for each field of a config that the result no longer agrees with.

    Args:
        config: the parsed `config.json`.
        aliases: names of the result that share the tensor of another.
        ties: groups of the source's names that are one tensor.
    """
    before, after = plan.source, dict(plan.specs)
    found: list[str] = []
    for path, value in fields_of(config) if isinstance(config, dict) else ():
        name = path.rpartition(".")[2]
        now = ""
        if name == "quantization_config":
            now = _no_longer_packed(before, after)
        elif name in ("torch_dtype", "dtype") and isinstance(value, str):
            now = _of_another_dtype(value, before, after)
        elif name.startswith("tie_") and isinstance(value, bool):
            now = tied_otherwise(value, plan, aliases, list(ties))
        elif is_layer_list(name, value) and entries_by_layer(value, plan) is None:
            now = _of_another_depth(len(value), before, after)
        elif type(value) is int and value > 1 and _LAYERS.search(name):
            now = _of_another_depth(value, before, after)
        elif type(value) is int and value > 1 and _SIZES.search(name):
            now = _of_another_size(value, plan)
        if now:
            shown = value if not isinstance(value, dict) else "{" + ", ".join(map(str, value))[:80] + "}"
            shown = f"a list of {len(value)}" if isinstance(value, list) else shown
            found.append(f"{path} = {shown}, but {now}")
    return found


def as_warnings(remarks: list[str]) -> tuple[Diagnostic, ...]:
    """The warnings that a report shows."""
    help = "correct the field in the config.json of the output"
    return tuple(
        Diagnostic("stale-config", f"config.json says {remark}", help=help, severity="warning") for remark in remarks
    )


def fields_of(config: Mapping[str, Any], above: str = "", depth: int = 8) -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of each field, of tables within tables too."""
    for name, value in config.items():
        path = f"{above}{name}"
        yield path, value
        if isinstance(value, dict) and name != "quantization_config" and depth:
            yield from fields_of(value, f"{path}.", depth - 1)


def _no_longer_packed(before: Mapping[str, TensorSpec], after: Mapping[str, TensorSpec]) -> str:
    packed = [Counter(s.dtype for s in specs.values() if s.dtype.startswith(_PACKED)) for specs in (before, after)]
    if not packed[0] or packed[0] == packed[1]:
        return ""
    was, now = (", ".join(f"{n} {dtype}" for dtype, n in sorted(c.items())) or "none" for c in packed)
    return f"of its quantised tensors ({was}) the output has {now}"


def _of_another_dtype(value: str, before: Mapping[str, TensorSpec], after: Mapping[str, TensorSpec]) -> str:
    try:
        said = dtype_name(value.removeprefix("torch."))
    except CheckpointError:
        return ""
    was, now = common_dtype(before), common_dtype(after)
    return f"most of the output's numbers are {now}" if now and now not in (said, was) else ""


def is_unpacked(before: Mapping[str, TensorSpec], after: Mapping[str, TensorSpec]) -> bool:
    """Whether there were quantised tensors, and are none any more."""
    packed = [any(spec.dtype.startswith(_PACKED) for spec in specs.values()) for specs in (before, after)]
    return packed == [True, False]


def common_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """Return the dtype of most floats of 16 bits or more; it is the dtype in the config of a quantised model too."""
    weights: Counter[str] = Counter()
    for spec in specs.values():
        if DTYPES[spec.dtype].kind == "float" and DTYPES[spec.dtype].bits >= 16:
            weights[spec.dtype] += spec.numel
    return weights.most_common(1)[0][0] if weights else ""


def tied_otherwise(value: bool, plan: Plan, aliases: Mapping[str, str], ties: list[tuple[str, ...]]) -> str:
    """Return the reason why a field about ties is stale; empty where it is right."""
    if not value:
        alias = next((name for name, other in aliases.items() if not (has_number(name) and has_number(other))), None)
        return f"{alias} and {aliases[alias]} are one tensor" if alias is not None and not ties else ""
    same = {name: names[0] for names in ties for name in names}
    made: dict[str, str] = {}
    for step in plan.steps:
        for source, targets in _matrices(step.sources, step.targets, plan.specs):
            for target in targets:
                first = made.setdefault(same.get(source, source), target)
                if has_number(first) and has_number(target):
                    continue  # a layer that is copied; the tie is one of an embedding and a head
                if target != first and target not in aliases and aliases.get(first) != target:
                    return f"{first} and {target} are stored as two tensors"
    return ""


def _matrices(
    sources: tuple[str, ...], targets: tuple[str, ...], specs: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, list[str]]]:
    """A source that is alone, with its targets of two dimensions and one size."""
    held = [key for key in targets if key in specs and len(specs[key].shape) == 2]
    if len(sources) == 1 and len({specs[key].numel for key in held}) == 1:
        yield sources[0], held


def _of_another_depth(value: int, before: Mapping[str, TensorSpec], after: Mapping[str, TensorSpec]) -> str:
    was, now = _counts(before), _counts(after)
    if value not in was or value in now or any(value in spec.shape for spec in after.values()):
        return ""
    return f"its numbered parts come to {max(now)} now" if now else ""


def _counts(specs: Mapping[str, TensorSpec]) -> set[int]:
    """How many numbers stand at each place of keys that are alike otherwise."""
    seen: dict[str, set[str]] = {}
    for key in specs:
        for match in NUMBER.finditer(key):
            seen.setdefault(key[: match.start()], set()).add(match.group())
    return {len(numbers) for numbers in seen.values()}


def _of_another_size(value: int, plan: Plan) -> str:
    if any(value in spec.shape for spec in plan.specs.values()):
        return ""
    became: Counter[int] = Counter()
    example = ""
    for step in plan.steps:
        if len(step.sources) != 1 or len(step.targets) != 1:
            continue
        (was,), (now,) = step.program.inputs, step.program.outputs
        lost = list((Counter(was.shape) - Counter(now.shape)).elements())
        new = list((Counter(now.shape) - Counter(was.shape)).elements())
        sized = len(was.shape) == len(now.shape) and was.numel != now.numel
        if sized and value in lost and len(set(new)) == 1 and len(set(lost)) == 1:
            became[new[0]] += 1
            example = example or f"{step.targets[0]} is {now}"
    if not became:
        return ""
    size, times = became.most_common(1)[0]
    return f"the axes of {value} are of {size} in {counted(times, 'tensor')} now ({example})"
