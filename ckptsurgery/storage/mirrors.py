"""Trees that belong to a model's tensors: optimizers, and trees of tensors with the model's keys or shapes.

A tree is one of these where
1. it is an optimizer by its shape (`state` beside `param_groups`), or by its name and has tensors;
2. one of its tensors is called as a tensor of the model, prefixes aside, and has its shape, or a key of several parts;
3. one of its matrices has the shape of one of the model's; an EMA's list and a state by number are found by this;
4. half as many of its vectors have shapes of the model's as the model has tensors;
5. one of its vectors has as many elements as all of the model's tensors, as flattened copies have.

The smallest such parts are named; where all parts of a mapping are such, the mapping is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..specs import TensorSpec
from ..wording import counted
from .contents import Entry
from .unpickling.inert import Ordered
from .unpickling.nodes import DEPTH, is_state, name_of

__all__ = ["Mirror", "has_weights", "is_optimizer", "leaf_spec", "mirrors_in", "parts_of"]

_VISITS = 100_000  # mappings that are looked into one by one; a graph of shared ones has exponentially many paths

_KINDS = 16  # kinds of parts that are compared


@dataclass(frozen=True, slots=True)
class Mirror:
    """A tree beside the model that belongs to its tensors.

    Args:
        path: dotted.
        why: what shows it.
        tree: it.
    """

    path: str
    why: str
    tree: Any


def mirrors_in(
    extras: Mapping[str, Any], model: Mapping[str, TensorSpec], some: Mapping[str, TensorSpec]
) -> list[Mirror]:
    """The trees among a checkpoint's extras that belong to some of the model's tensors.

    >>> w = Entry(TensorSpec([2, 3], "F32"), "x.pt")
    >>> [(m.path, m.why) for m in mirrors_in({"n": 3, "ema": {"rate": 0.9, "w": {"a.w": w}}}, *[{"a.w": w.spec}] * 2)]
    [('ema.w', '1 tensor, called as the model is')]

    Args:
        model: key -> spec of all of the model's tensors.
        some: those in question.
    """
    elements = sum(spec.numel for spec in model.values())
    judge = _Judge(model, {spec.shape for spec in model.values()}, len(model), elements)
    found: list[Mirror] = []
    for path, value in extras.items():
        if path != "_metadata" and not is_state(path):
            found += judge.within(value, path, 0)
    if len(some) == len(model):
        return found
    judge = _Judge(some, {spec.shape for spec in some.values()}, len(some), elements)
    return [mirror for mirror in found if judge.why(mirror.tree, mirror.path)]


def parts_of(value: dict[Any, Any]) -> dict[Any, Any]:
    """A shallow copy of a mapping of a checkpoint's tree, of the same kind."""
    if type(value) is not Ordered:
        return dict(value)
    made = Ordered()
    made.update(value)
    made.attributes = value.attributes
    return made


@dataclass
class _Judge:
    model: Mapping[str, TensorSpec]
    shapes: set[tuple[int, ...]]
    count: int
    elements: int
    visits: int = 0
    trees: dict[int, bool] = field(default_factory=dict)

    def within(self, value: Any, path: str, depth: int) -> list[Mirror]:
        """The smallest parts of a value that belong to the model."""
        if not _has_parts(value):
            return []
        self.visits += 1
        whole = _is_named(path) or not isinstance(value, dict) or is_optimizer(value) or depth >= DEPTH
        if whole or self.visits > _VISITS or any(self.is_leaf(key, part) for key, part in value.items()):
            why = self.why(value, path)
            return [Mirror(path, why, value)] if why else []
        inside = [(self.within(part, f"{path}.{name_of(key)}", depth + 1), part) for key, part in value.items()]
        found = [(mirrors, part) for mirrors, part in inside if mirrors]
        alike = [set(map(name_of, part)) for _, part in found if isinstance(part, dict)]  # such as one for each tensor
        others = [part for mirrors, part in inside if not mirrors and _has_weights(part, self.trees)]
        apart = any(not isinstance(part, dict) or set(map(name_of, part)) not in alike[:_KINDS] for part in others)
        every = [mirror for mirrors, _ in found for mirror in mirrors]
        if len(found) + len(others) > 1 and not apart and all(len(mirrors) == 1 for mirrors, _ in found) and found:
            return [Mirror(path, self.why(value, path) or every[0].why, value)]
        return every

    def why(self, value: Any, path: str) -> str:
        """What shows that a tree as a whole belongs to the model; empty where nothing does."""
        tensors: list[tuple[str, TensorSpec]] = []
        optimizers = 0
        for inner, part in _nodes(value, path):
            spec = leaf_spec(part)
            if spec is not None:
                tensors.append((inner, spec))
            optimizers += isinstance(part, dict) and is_optimizer(part)
        if optimizers or (_is_named(path) and any(spec.shape for _, spec in tensors)):
            return f"an optimizer's state, {counted(len(tensors), 'tensor')}"
        held = counted(len(tensors), "tensor")
        if any(self.called(inner, spec) for inner, spec in tensors):
            return f"{held}, called as the model is"
        if any(_weighs(spec) and spec.shape == (self.elements,) for _, spec in tensors):
            return f"{held}, as long as all of the model's together"
        alike = [spec for _, spec in tensors if _weighs(spec) and spec.shape in self.shapes]
        matrix = any(len(spec.shape) > 1 and spec.numel > 1 for spec in alike)
        return f"{held} of the model's shapes" if matrix or (alike and 2 * len(alike) >= self.count) else ""

    def is_leaf(self, key: Any, part: Any) -> bool:
        """Whether a part of a mapping is a tensor that makes the mapping one tree."""
        spec = leaf_spec(part)
        return spec is not None and (_weighs(spec) or self.called(name_of(key), spec))

    def called(self, path: str, spec: TensorSpec) -> bool:
        """Whether a tensor's path ends in a key of the model."""
        at = 0
        while at >= 0:
            key = path[at:]
            known = self.model.get(key)
            same = known is not None and bool(spec.shape) and known.shape == spec.shape
            # masks and codes have whole numbers, so that both the name and the shape must agree
            if known is not None and (same or "." in key if _weighs(spec) else same and "." in key):
                return True
            at = path.find(".", at) + 1 or -1
        return False


def _is_named(path: str) -> bool:
    return "optim" in path.rpartition(".")[2].lower()


def is_optimizer(value: Any) -> bool:
    """Whether a value has the parts of an optimizer's state dict."""
    return isinstance(value, dict) and "state" in value and "param_groups" in value


def _nodes(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything within a tree, each shared part once."""
    seen: set[int] = set()
    waiting = [(path, value)]
    while waiting:
        above, node = waiting.pop()
        yield above, node
        if not _has_parts(node) or id(node) in seen:
            continue
        seen.add(id(node))
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        held = ((key, part) for key, part in pairs if _has_parts(part) or leaf_spec(part) is not None)
        waiting += [(f"{above}.{name_of(key)}", part) for key, part in held]


def _has_parts(value: Any) -> bool:
    return isinstance(value, dict | list | tuple) and not isinstance(value, Entry)


def has_weights(value: Any) -> bool:
    """Whether a part of a checkpoint's tree holds tensors that weigh: floats with an axis."""
    return any(_is_weight(part) for _, part in _nodes(value, ""))


def _has_weights(value: Any, known: dict[int, bool]) -> bool:
    if id(value) not in known:
        known[id(value)] = has_weights(value)
    return known[id(value)]


def _is_weight(value: Any) -> bool:
    spec = leaf_spec(value)
    return spec is not None and _weighs(spec)


def _weighs(spec: TensorSpec) -> bool:
    return bool(spec.shape) and (spec.dtype == "BF16" or not spec.dtype.startswith(("U", "I", "B")))


def leaf_spec(value: Any) -> TensorSpec | None:
    """Return the spec of a tensor among the extras, in a file or in memory; None for all else."""
    if isinstance(value, Entry):
        return value.spec
    if type(value).__module__.partition(".")[0] != "torch" or not hasattr(value, "untyped_storage"):
        return None
    from ..errors import CheckpointError
    from .tensors import spec_of

    try:
        return spec_of(value)
    except CheckpointError:
        return None
