"""Keys as modules: a unit is what one layer owns (weight, bias, statistics), under one path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..specs import DTYPES, TensorSpec

__all__ = ["Leaf", "LeafPart", "Unit", "read_units", "split_path"]

_SEPARATORS = re.compile(r"([./])")
_NUMBER = re.compile(r"(\d+)")

# What a leaf's last segment says; None marks a leaf that belongs to no module, whose name is all there is.
_ROLES = {
    "weight": "weight", "kernel": "weight", "w": "weight", "embedding": "weight", "gamma": "weight", "scale": "weight",
    "_weight": "weight", "weights": "weight",
    "bias": "bias", "biases": "bias", "beta": "bias", "b": "bias", "offset": "bias", "_bias": "bias",
    "running_mean": "mean", "moving_mean": "mean", "mean": "mean", "_mean": "mean",
    "running_var": "var", "moving_variance": "var", "moving_var": "var", "var": "var", "variance": "var",
    "_variance": "var",
    "num_batches_tracked": "batches",
    "weight_g": "weight_g", "weight_v": "weight_v", "weight_scale_inv": "scale_inv", "weight_scale": "weight_scale",
    "qweight": "qweight", "qzeros": "qzeros", "scales": "scales", "g_idx": "g_idx",
}  # fmt: skip
# Alone under their module these are parameters of their own: a lone `gamma` scales a branch, beside a `beta` it is a
# norm's.
_NEED_SIBLING = {"gamma": "beta", "w": "b", "b": "w", "scale": None, "mean": "var", "var": "mean", "offset": "scale"}
_ENDINGS = (("_weight", "weight"), ("_kernel", "weight"), ("_bias", "bias"))
_PARAMETRIZED = re.compile(r"^(?P<path>.*)\.parametrizations\.(?P<leaf>\w+)\.original(?P<n>[01]?)$")


@dataclass(frozen=True, slots=True)
class LeafPart:
    """One tensor of a side: its key, and the shape that matching sees."""

    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a unit holds in one role: a tensor, or several that are fused along an axis.

    Args:
        shape: after fusing.
        kind: `"float"`, `"int"`, … of the dtype.
        parts: the tensors, in order; one where nothing is fused.
        fuse: how the parts make the whole: None; `"concat"` or `"stack parts"` of parts that names tell apart;
            `"concat index"` or `"stack"` of parts that a number counts; `"stack concat"` of both.
    """

    shape: tuple[int, ...]
    kind: str
    parts: tuple[LeafPart, ...]
    fuse: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the parts."""
        return tuple(p.key for p in self.parts)


@dataclass(frozen=True)
class Unit:
    """A module's tensors.

    Args:
        path: the key up to the leaf, separators and numbers as they stand.
        leaves: role -> leaf.
        order: rank of its first tensor on its side.
        members: paths of the units that were fused into this one.
        roles: what structure says of it, such as `"gate"`, beside its name.
    """

    path: str
    leaves: Mapping[str, Leaf]
    order: int
    members: tuple[str, ...] = ()
    roles: frozenset[str] = field(default_factory=frozenset)

    @property
    def segments(self) -> tuple[str, ...]:
        """The path's segments."""
        return tuple(_SEPARATORS.split(self.path)[::2])

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers in the path, in order."""
        return tuple(int(n) for n in _NUMBER.findall(self.path))

    @property
    def template(self) -> str:
        """The path with every number replaced by `#`."""
        return _NUMBER.sub("#", self.path)

    @property
    def weight(self) -> Leaf:
        """The leaf that shows best what the unit is."""
        return self.leaves.get("weight") or next(iter(self.leaves.values()))


def split_path(key: str) -> tuple[str, str]:
    """A key's path with its last separator, and its last segment.

    >>> split_path("a.0/b.weight"), split_path("scale")
    (('a.0/b.', 'weight'), ('', 'scale'))
    """
    cut = max(key.rfind("."), key.rfind("/")) + 1
    return key[:cut], key[cut:]


def read_units(specs: Iterable[tuple[str, TensorSpec]]) -> list[Unit]:
    """The units of a side, in the order of their first tensors.

    >>> units = read_units([("ln.gamma", TensorSpec((4,), "F32")), ("ln.beta", TensorSpec((4,), "F32")),
    ...                     ("blk.gamma", TensorSpec((4,), "F32"))])
    >>> [(u.path, list(u.leaves)) for u in units]
    [('ln', ['weight', 'bias']), ('blk.gamma', ['weight'])]
    """
    listed = list(specs)
    tail = _tail([key for key, _ in listed])
    names: dict[str, set[str]] = {}
    for key, _ in listed:
        path, last = split_path(key.removesuffix(tail))
        names.setdefault(path, set()).add(last)
    found: dict[str, dict[str, Leaf]] = {}
    orders: dict[str, int] = {}
    for order, (key, spec) in enumerate(listed):
        path, role = _place(key.removesuffix(tail), names)
        leaves = found.setdefault(path, {})
        if role in leaves:
            path, role = key.removesuffix(tail), "weight"
            leaves = found.setdefault(path, {})
        orders.setdefault(path, order)
        kind = DTYPES[spec.dtype].kind if spec.dtype in DTYPES else "float"
        leaves[role] = Leaf(tuple(spec.shape), kind, (LeafPart(key, tuple(spec.shape), spec.dtype),))
    return [Unit(path, leaves, orders[path]) for path, leaves in found.items()]


def _tail(keys: Sequence[str]) -> str:
    """What all keys end in beside their last words, such as `:0`; it says nothing."""
    found = re.search(r"[^\w./]\w*$", keys[0]) if len(keys) > 1 else None
    return found[0] if found and all(k.endswith(found[0]) for k in keys) else ""


def _place(key: str, names: Mapping[str, set[str]]) -> tuple[str, str]:
    """The unit that a key belongs to, and its role there."""
    parametrized = _PARAMETRIZED.match(key)
    if parametrized:
        letter = {"0": "_g", "1": "_v", "": ""}[parametrized["n"]]
        return parametrized["path"], parametrized["leaf"] + letter
    path, last = split_path(key)
    if last in _ROLES and path:
        if last in _NEED_SIBLING and not _belongs(path, last, names[path]):
            return key, "weight"
        return path[:-1], _ROLES[last]
    for ending, role in _ENDINGS:
        if last.endswith(ending) and len(last) > len(ending):
            return key[: -len(ending)], role
    return key, "weight"


def _belongs(path: str, last: str, siblings: set[str]) -> bool:
    needed = _NEED_SIBLING[last]
    if needed is not None:
        return needed in siblings
    # A scale with no sibling makes a norm where the module is small: nothing but leaves beside it.
    return last != "scale" or siblings <= {"scale", "bias", "offset", "mean", "var"}
