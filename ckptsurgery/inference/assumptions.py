"""What headers cannot show, said of each tensor that it concerns."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..language.folding import fold
from ..specs import TensorSpec
from ..wording import brief, listed
from .matches import Matched
from .moves import TensorMove
from .neighbours import Neighbours
from .norms import is_norm, stage
from .roles import parent
from .sides import UnitSide
from .units import Unit
from .vocabulary import concepts

__all__ = ["Assumption", "assumed"]


@dataclass(frozen=True, repr=False)
class Assumption:
    """Something that the recipe takes on trust.

    Args:
        kind: `"rows"`, `"order"`, `"chunks"`, `"norms"`, `"square"`, `"turned"`, `"gate"`,
            `"place"`, `"double"`, `"shared"`, `"tied"`, `"depth"`, `"tree"` or, by values, `"cast"`, `"equal"` or
            `"values"`; by inputs, `"parity"`.
        text: one sentence.
        keys: the target keys that it concerns.
    """

    kind: str
    text: str
    keys: tuple[str, ...]

    def __repr__(self) -> str:
        return brief("Assumption", self.kind, self.text, listed(self.keys))


_TEXTS = {
    "rows": "the rows of query and key projections (and of what fuses them) keep their order; codebases that interleave"
    " rotary halves or heads order them otherwise",
    "order": "what is fused lies block after block in the order written, not interleaved",
    "chunks": "projections that make several vectors at once (shift, scale, gate) make them in the same order",
    "norms": "norms of a layer whose names do not say in the same words where they stand go by their order",
    "square": "square matrices, which show no transposition, are turned or not as their neighbours are",
    "turned": "a tensor is rearranged to the shape that another one beside it has already, and names do not tell which"
    " of the two is meant",
    "gate": "of two equal projections, the gate is the one that is named or numbered first",
    "place": "names do not tell these from others of the same shape; they go by their order and by the modules around"
    " them",
    "double": "another tensor of the same module and shape is used for nothing, and names do not tell which is meant",
    "shared": "one tensor of the source makes all of them, because the source has no other of its kind",
    "tied": "tensors of an embedding's shape may be tied to it or be copies of their own",
}
_ORDERED = frozenset({"query", "key", "qkv", "kv"})


def assumed(
    found: Matched, target: Mapping[str, TensorSpec], expand: Callable[[Sequence[str]], Sequence[str]] = list
) -> tuple[Assumption, ...]:
    """The assumptions of a match, a kind each; `expand` gives all keys that some stand for."""
    keys: dict[str, list[str]] = defaultdict(list)
    roles = {k: u.roles for u in found.b.units for leaf in u.leaves.values() for k in leaf.keys}
    sources = {k: u.roles for u in found.a.units for leaf in u.leaves.values() for k in leaf.keys}
    gated = {parent(u.path) for u in found.b.units if "gate" in u.roles}
    beside = {k for u in found.b.units if parent(u.path) in gated and "up" in u.roles for k in u.weight.keys}
    chunked = {k for side in (found.a, found.b) for u in side.units if _modulates(u) for k in _keys(u)}
    ranks = _ranks(found.a), _ranks(found.b)
    near, there = Neighbours(found.a), Neighbours(found.b)
    used = {k for move in found.moves for k in move.sources}
    for move in found.moves:
        told = {ranks[0].get(k) for k in move.sources} | {ranks[1].get(k) for k in move.targets}
        names = {re.split(r"[./]", k)[-2:][0] for k in (*move.sources, *move.targets)}
        if ranks[1].keys() & set(move.targets) and (len(told) > 1 or None in told) and len(names) > 1:
            keys["norms"] += move.targets
        if len(move.sources) == 1 and move.sources[0] in near.shapes:
            known = (k for k in move.targets if k in there.paths)
            keys["double"] += [k for k in known if near.double(move.sources[0], there.paths[k], used)]
        if chunked & {*move.sources, *move.targets}:
            keys["chunks"] += move.targets
        if move.left and not move.fuse and move.sources[0] in near.shapes:
            known = (k for k in move.targets if k in there.shapes)
            keys["turned"] += [k for k in known if near.rival(move.sources[0], there.shapes[k], there.paths[k])]
        for kind in _kinds(move, roles, sources, beside):
            keys[kind] += move.targets
    made = [k for move in found.moves for k in move.targets]
    keys["place"] = [k for k in made if k in found.placed]
    keys["shared"] = [k for k in (*made, *found.ties) if k in found.shared]
    keys["tied"] += [k for k in _may_be_tied(found, target) if k not in keys["tied"]]
    listed = {kind: expand(keys[kind]) for kind in _TEXTS if keys[kind]}
    plain = [Assumption(k, f"{_TEXTS[k]}: {_folded(names)}", tuple(names)) for k, names in listed.items()]
    return (*plain, *_trees(found, expand))


def _trees(found: Matched, expand: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[Assumption]:
    """What was chosen where several stacks of a side fit one of the other alike, such as weights and their averages."""
    made = [k for move in found.moves for k in move.targets]
    for pairing in found.placement.pairings:
        if not pairing.rivals:
            continue
        one, two = pairing.source, pairing.target
        around = {k for u in two.around for leaf in u.leaves.values() for k in leaf.keys}
        keys = expand([k for k in made if two.holds(k) is not None or k in around])
        others = " and ".join(f"'{at}'" for at in pairing.rivals)
        text = f"'{two.at}' is made of '{one.at}'; by names and shapes {others} would do as well"
        yield Assumption("tree", text, tuple(keys))


def _keys(unit: Unit) -> list[str]:
    return [k for leaf in unit.leaves.values() for k in leaf.keys]


def _ranks(side: UnitSide) -> dict[str, int | None]:
    """The rank of each norm in a layer that has several, as their names tell it, key by key; None where they do not.

    Norms with statistics stand behind a convolution, with which they go.
    """
    layers: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, unit in enumerate(side.units):
        if side.slots[i] and len(unit.weight.shape) == 1 and is_norm(unit.path) and "mean" not in unit.leaves:
            layers[side.slots[i], unit.weight.shape].append(i)
    found: dict[str, int | None] = {}
    for members in layers.values():
        said = [stage(side.spelled[i]) for i in members]
        places = sorted({where for where in said if where is not None})
        told = len(places) == len(said)
        for i, where in zip(members, said) if len(members) > 1 else ():
            found |= dict.fromkeys(_keys(side.units[i]), places.index(where) if told and where is not None else None)
    return found


def _modulates(unit: Unit) -> bool:
    """Whether a unit makes several vectors of one width that scale and shift, told by its name and its shape."""
    shape = [n for n in unit.weight.shape if n > 1]
    if len(shape) != 2 or shape[0] == shape[1] or max(shape) % min(shape):
        return False
    meant = {c for segment in unit.segments[-3:] for c, _ in concepts(segment)}
    return "modulation" in meant or is_norm(unit.path)


def _kinds(
    move: TensorMove, roles: Mapping[str, frozenset[str]], sources: Mapping[str, frozenset[str]], beside: set[str]
) -> Iterable[str]:
    """What a move takes on trust; `beside` are the targets that stand beside a gate."""
    found = {r for k in move.targets for r in roles.get(k, ())} | {r for k in move.sources for r in sources.get(k, ())}
    if found & _ORDERED:
        yield "rows"
    if "order" in move.trust:
        yield "order"
    if "square" in move.trust:
        yield "square"
    if ("gate" in found or beside & set(move.targets)) and not _named(move):
        yield "gate"


def _named(move: TensorMove) -> bool:
    """Whether both sides call the gate a gate."""
    return all(any("gate" in k for k in side) or any("up" in k for k in side) for side in (move.sources, move.targets))


def _may_be_tied(found: Matched, target: Mapping[str, TensorSpec]) -> list[str]:
    """Keys that are tied in the recipe, and pairs of an embedding and an output that might have been."""
    result = list(found.ties)
    shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for key, spec in target.items():
        if len(spec.shape) == 2:
            shapes[tuple(spec.shape)].append(key)
    for group in shapes.values():
        meant = {k: {c for s in k.replace("/", ".").split(".") for c, _ in concepts(s)} for k in group}
        if any({"embedding", "token"} & m for m in meant.values()):
            result += [k for k, m in meant.items() if {"head", "output"} & m and not {"attention", "mlp", "norm"} & m]
    return list(dict.fromkeys(result))


def _folded(keys: Iterable[str]) -> str:
    lines = [text for text, _ in fold(keys)]
    return ", ".join(lines[:4]) + (f", and {len(lines) - 4} more" if len(lines) > 4 else "")
