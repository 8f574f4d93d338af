"""What the transformers library's conversion operations do to the axes of tensors, in the notation of rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .conversion_groups import ConversionGroup, Shape

__all__ = ["ConversionAxes", "NotSayable", "axes_of"]

_NAMES = "abcdefgh"


class NotSayable(Exception):
    """A mapping that cannot be put into the other notation, with the reason."""


@dataclass(frozen=True)
class ConversionAxes:
    """The axes of a rule.

    Args:
        source, target: lists of axes, with their brackets; empty where a tensor moves as it is.
        dims: sizes that the axes need.
        after: what is done afterwards to some targets alone: (their numbers, axes).
        flat: whether what is gathered into several targets is numbered in one row.
    """

    source: str = ""
    target: str = ""
    dims: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[tuple[tuple[int, ...], ConversionAxes], ...] = ()
    flat: bool = False


@dataclass
class _ConversionDraft:
    """Axes on both sides of a rule while operations are applied: for each dimension the names that make it up."""

    group: ConversionGroup
    config: Any
    source: list[list[str]]
    target: list[list[str]]
    dims: dict[str, Any] = field(default_factory=dict)
    after: list[tuple[tuple[int, ...], ConversionAxes]] = field(default_factory=list)
    split: bool = False
    flat: bool = False
    sized: bool = False

    def text(self) -> ConversionAxes:
        if self.source == self.target:
            return ConversionAxes(after=tuple(self.after))
        tail = 0
        while (
            tail < min(len(self.source), len(self.target))
            and len(self.source[-1 - tail]) == 1
            and self.source[-1 - tail] == self.target[-1 - tail]
        ):
            tail += 1
        source, target = (axes[: len(axes) - tail] for axes in (self.source, self.target))
        dots = ["..."] if tail else []
        left, right = ("[" + " ".join([*map(_dimension, axes), *dots]) + "]" for axes in (source, target))
        return ConversionAxes(left, right, self.dims, tuple(self.after), self.flat)


def axes_of(group: ConversionGroup, config: Any, sized: bool = False) -> ConversionAxes:
    """Return the axes of the rule that a conversion is.

    Args:
        config: the model's, which some operations read.
        sized: give the sizes of unequal parts, for a recipe of one model; a target shows them otherwise.

    Raises:
        NotSayable: an operation that the notation has no words for; the reason names it.
    """
    if group.transform is None:
        return ConversionAxes()
    shape = group.shapes[f"file:{group.files[0][0]}"]
    if len(shape) > len(_NAMES):
        raise NotSayable(f"tensors of {len(shape)} dimensions")
    draft = _ConversionDraft(
        group, config, [[n] for n in _NAMES[: len(shape)]], [[n] for n in _NAMES[: len(shape)]], sized=sized
    )
    for operation in group.transform.operations:
        name = type(operation).__name__
        if name not in _OPERATIONS:
            raise NotSayable(f"the operation {name}")
        _OPERATIONS[name](draft, operation)
    return draft.text()


def _dimension(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"({' '.join(names)})"


def _single(draft: _ConversionDraft, dim: int) -> str:
    names = draft.target[dim]
    if len(names) != 1:
        raise NotSayable(f"an operation on dimension {dim}, which is composed already")
    return names[0]


def _in_source(draft: _ConversionDraft, name: str, names: list[str]) -> None:
    """Put several names in the place of one, on the side of the files."""
    for axes in draft.source:
        if name in axes:
            at = axes.index(name)
            axes[at : at + 1] = names


def _merge(draft: _ConversionDraft, operation: Any) -> None:
    draft.target.insert(operation.dim, ["e"])


def _concatenate(draft: _ConversionDraft, operation: Any) -> None:
    dim, files = operation.dim, draft.group.files
    if getattr(operation, "num_shards_attribute", None) is not None:
        draft.target[dim] = ["e", *draft.target[dim]]
        return
    name = _single(draft, dim)
    at = next(n for n, axes in enumerate(draft.source) if name in axes)
    sizes = {draft.group.shapes[f"file:{keys[0]}"][at] for keys in files}
    marked = f"{name}:p" if len(sizes) > 1 else name
    _in_source(draft, name, [marked])
    draft.target[dim] = ["p", marked]


def _chunk(draft: _ConversionDraft, operation: Any) -> None:
    dim, models = operation.dim, draft.group.models
    if getattr(operation, "num_shards_attribute", None) is not None:
        raise NotSayable("a split into as many keys as the config says")
    if draft.target[dim][0] == "two" and len(models) == 2:
        _in_source(draft, "two", ["p"])  # what was interleaved comes apart
        draft.target[dim] = draft.target[dim][1:]
        draft.dims.pop("two")
        return
    name = _single(draft, dim)
    at = next(n for n, axes in enumerate(draft.target) if name in axes)
    sizes = tuple(draft.group.shapes[key][at] for key in models)
    marked = f"{name}:p" if len(set(sizes)) > 1 else name
    if draft.sized and marked != name:
        draft.dims[name] = sizes
    _in_source(draft, name, ["p", marked])
    draft.target[dim] = [marked]
    draft.split = True


def _stack_apart(draft: _ConversionDraft, operation: Any) -> None:
    """Experts of several kinds in one list, each kind stacked by itself."""
    draft.target.insert(operation.stack_dim, ["e"])
    if len(draft.group.files) > 1:
        name = _single(draft, operation.concat_dim)
        draft.target[operation.concat_dim] = ["p", name]
    kinds = len(draft.group.models)
    draft.dims["m"] = kinds
    each = _experts(draft.config, len(draft.group.files[0]) // kinds)
    if each is not None:  # the way back asks for it
        draft.dims["e"] = each
    draft.flat = True


def _interleave(draft: _ConversionDraft, operation: Any) -> None:
    name = _single(draft, operation.dim)
    apart, together = [name, "two"], ["two", name]
    _in_source(draft, name, together if operation.inverse else apart)
    draft.target[operation.dim] = apart if operation.inverse else together
    draft.dims["two"] = 2


def _transpose(draft: _ConversionDraft, operation: Any) -> None:
    if operation.check_dims:  # transposed only where the file has it otherwise; the library saves it as the model has
        return
    a, b = operation.dim0, operation.dim1
    draft.target[a], draft.target[b] = draft.target[b], draft.target[a]


def _rotary(draft: _ConversionDraft, operation: Any) -> None:
    wanted = operation.permute_layer_names
    patterns = draft.group.transform.target_patterns if draft.split else draft.group.transform.source_patterns
    chosen = tuple(n for n, p in enumerate(patterns) if wanted is None or any(w in p for w in wanted))
    if not draft.split and len(chosen) == len(patterns) == 1:
        name = _single(draft, 0)
        pairs, halves = ["h", name, "two"], ["h", "two", name]
        _in_source(draft, name, halves if operation.inverse else pairs)
        draft.target[0] = pairs if operation.inverse else halves
        draft.dims |= {"two": 2, "h": _heads(draft.config, operation.subconfig_key)}
        return
    if not draft.split:
        raise NotSayable("rotary rows of some of the tensors that are joined")
    before, after = "[(h a two) ...]", "[(h two a) ...]"
    if operation.inverse:
        before, after = after, before
    dims = {"two": 2, "h": _heads(draft.config, operation.subconfig_key)}
    draft.after.append((chosen, ConversionAxes(before, after, dims)))


def _heads(config: Any, part: str | None) -> str | int:
    """Where the config says how many heads there are, as an expression; the number where its file does not hold it."""
    inner = getattr(config, part, config) if part is not None else config
    name = getattr(inner, "attribute_map", {}).get("num_attention_heads", "num_attention_heads")
    if not hasattr(inner, name):
        return 1
    return f"config.{part}.{name}" if inner is not config else f"config.{name}"


def _experts(config: Any, count: int) -> str | None:
    """The expression for the number of experts in the config; None where none of its numbers is that."""
    for part in (None, "text_config"):
        inner = getattr(config, part, None) if part is not None else config
        name = getattr(inner, "attribute_map", {}).get("num_experts", "num_experts")
        if getattr(inner, name, None) == count:
            return f"config.{part}.{name}" if part is not None else f"config.{name}"
    return None


def _flatten(draft: _ConversionDraft, operation: Any) -> None:
    if len(draft.target) == 2:
        return
    sizes: Shape = (operation.in_channels, *operation.kernel_size)
    names = [names[0] for names in draft.target[1:]]
    draft.target = [draft.target[0], names]
    draft.dims |= dict(zip(names, sizes))


_OPERATIONS: dict[str, Callable[[_ConversionDraft, Any], None]] = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _chunk,
    "Interleave": _interleave,
    "Transpose": _transpose,
    "PermuteForRope": _rotary,
    "Conv3dToLinear": _flatten,
    "ErnieFuseAndSplitTextVisionExperts": _stack_apart,
}
