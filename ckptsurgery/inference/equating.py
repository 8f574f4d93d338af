"""Two checkpoints that are compared by their values, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import CkptSurgeryError
from ..specs import TensorSpec
from ..storage.places.opening import open as open_checkpoint
from .chunks import ChunkedMatch
from .element_maps import bits_of, hashed
from .findings import Finding
from .moves import TensorMove
from .views import TensorLoads

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, dtype

    Array = np.ndarray[Any, Any]

__all__ = ["Equating", "Print", "made_by"]


@dataclass(frozen=True)
class Print:
    """The properties of a tensor that no rearrangement changes.

    Args:
        size: how many elements there are.
        total: a hash of the multiset of the values; the hash of several tensors is the sum of theirs.
        constant: whether all values are equal.
    """

    size: int
    total: int
    constant: bool

    @classmethod
    def of(cls, bits: Array) -> Print:
        """The print of values."""
        flat = bits.reshape(-1)
        return cls(flat.size, int(hashed(flat).sum()) if flat.size else 0, bool((flat == flat[:1]).all()))


@dataclass
class Equating:
    """Two checkpoints; the source's values are compared after a cast to the target's dtype.

    Args:
        source, target: the checkpoints, or views of them.
        specs, wanted: their headers, in the order in which keys are tried.
    """

    source: TensorLoads
    target: TensorLoads
    specs: Mapping[str, TensorSpec]
    wanted: Mapping[str, TensorSpec]
    kinds: dict[str, dtype] = field(default_factory=dict)
    prints: dict[tuple[int, str, Any], Print] = field(default_factory=dict)

    def kind(self, key: str) -> dtype:
        """A target's dtype."""
        if key not in self.kinds:
            import torch

            kind = self.target[key].load().dtype
            self.kinds[key] = kind if kind.is_floating_point or kind == torch.bool else torch.int64
        return self.kinds[key]

    def bits(self, side: int, key: str, kind: dtype) -> Array:
        """The values of a tensor of the source (0) or the target (1), in a dtype."""
        return bits_of((self.source, self.target)[side][key].load(), kind)

    def loader(self, side: int, kind: dtype) -> Callable[[str], Array]:
        """The same as a function of the key."""
        return lambda key: self.bits(side, key, kind)

    def print(self, side: int, key: str, kind: dtype) -> Print:
        """The print of a tensor, kept."""
        name = side, key, kind
        if name not in self.prints:
            self.prints[name] = Print.of(self.bits(side, key, kind))
        return self.prints[name]

    def alike(self, key: str) -> list[str]:
        """The source's tensors that have the values of a target's tensor, in any order."""
        kind = self.kind(key)
        own, size = self.print(1, key, kind), self.wanted[key].numel
        floats = kind.is_floating_point
        return [
            k
            for k, spec in self.specs.items()
            if spec.numel == size and _is_float(spec) == floats and self.print(0, k, kind) == own
        ]

    def permuted(self, finding: Finding) -> bool:
        """Whether both ends of a finding have the same values in some order."""
        kind = self.kind(finding.targets[0])
        totals = [
            sum(self.print(side, k, kind).total for k in keys) % 2**64
            for side, keys in enumerate((finding.sources, finding.targets))
        ]
        return totals[0] == totals[1]

    def differing(self, finding: Finding) -> list[str]:
        """The targets that a finding makes otherwise than they are; all where it does not run."""
        inner = {piece: cut.key for cut in finding.joins for piece in cut.pieces}
        load = _Pieces(self, finding)
        found: dict[str, None] = {}
        for move in finding.moves:
            try:
                made = _made(move, {k: load.source(k) for k in move.sources})
            except CkptSurgeryError:
                made = {}
            for key in move.targets:
                if key not in made or not _same(made[key], load.target(key)):
                    found[inner.get(key, key)] = None
        return list(found)

    def holds(self, finding: Finding) -> bool:
        """Whether a finding makes exactly what the target has."""
        return not self.differing(finding)

    def likeness(self, move: TensorMove) -> float:
        """How much of the variance of a move's targets it makes, the least of them; 0 if it fails."""
        try:
            made = _made(move, {k: self.source[k].load() for k in move.sources})
        except CkptSurgeryError:
            return 0.0
        return min((_explained(made[k], self.target[k].load()) if k in made else 0.0) for k in move.targets)


@dataclass(frozen=True)
class _Pieces:
    """The tensors and the blocks between which a finding's moves are."""

    sides: Equating
    finding: Finding

    def source(self, key: str) -> Tensor:
        return _piece(self.finding.splits, key, lambda k: self.sides.source[k].load())

    def target(self, key: str) -> Tensor:
        return _piece(self.finding.joins, key, lambda k: self.sides.target[k].load())


def _piece(cuts: Iterable[ChunkedMatch], key: str, load: Callable[[str], Tensor]) -> Tensor:
    for cut in cuts:
        if key in cut.pieces:
            import torch

            places = cut.places[cut.pieces.index(key)]
            return load(cut.key).index_select(cut.axis, torch.from_numpy(places))
    return load(key)


def made_by(finding: Finding, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a finding makes.

    Raises:
        CkptSurgeryError: a move does not fit the tensors.
    """
    import torch

    made: dict[str, Tensor] = {}
    for move in finding.moves:
        made |= _made(move, {k: _piece(finding.splits, k, tensors.__getitem__) for k in move.sources})
    for cut in finding.joins:
        listed = [int(n) for places in cut.places for n in places]
        whole = torch.cat([made.pop(k) for k in cut.pieces], cut.axis)
        order = sorted(range(len(listed)), key=listed.__getitem__)
        made[cut.key] = whole.index_select(cut.axis, torch.tensor(order))
    return made


def _made(move: TensorMove, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensor that one move makes."""
    from ..language.recipe import Recipe
    from ..planning.planner import make_plan
    from ..running.saving import state_dict_of

    atom = _as_rules(move)
    if atom is None:
        return {}
    part = open_checkpoint({k: t.contiguous() for k, t in tensors.items()})
    return state_dict_of(make_plan(part.specs, Recipe(**atom), lambda n: Recipe()), part)


def _as_rules(move: TensorMove) -> dict[str, Any] | None:
    """A recipe that is one move, its keys spelled out."""
    from .atoms import atoms

    never = lambda prefix: False  # noqa: E731
    try:
        listed = atoms([move], list(move.sources), (never, never), lambda p, v: tuple(v))
    except ValueError:
        return None
    rules = [f"{a.source} {a.left} -> {a.target} {a.right}".replace("  ", " ").strip() for a in listed]
    return {"rules": rules, "dims": {k: v for a in listed for k, v in a.dims.items()}}


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal, NaN to NaN, after one has been cast to the other's dtype where they differ."""
    import numpy as np

    return one.shape == two.shape and np.array_equal(bits_of(one, two.dtype), bits_of(two, two.dtype))


def _explained(one: Tensor, two: Tensor) -> float:
    """The share of the second's variance that the first explains; of its square where the first is constant."""
    import torch

    if one.shape != two.shape or not one.numel():
        return 0.0
    a, b = one.reshape(-1).to(torch.float64), two.reshape(-1).to(torch.float64)
    around = b if bool((a == a[0]).all()) else b - b.mean()
    whole = float(around @ around)
    return 1.0 - float((a - b) @ (a - b)) / whole if whole else 0.0


def _is_float(spec: TensorSpec) -> bool:
    from ..specs import DTYPES

    return spec.dtype in DTYPES and DTYPES[spec.dtype].kind == "float"
