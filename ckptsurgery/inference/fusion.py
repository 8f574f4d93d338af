"""What one side holds apart and the other as one: query, key and value; gate and up; experts; found by counting shapes.

A fusion is taken for all layers at once, and only if it makes the two sides' shapes more alike and the fused shape
exists opposite. It is taken role by role: weights may be fused while biases stay apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .placement import Placement
from .roles import attention_sorts, frame_of, listed_parts, parent, part_of, with_roles
from .units import Leaf, Unit, split_path
from .vocabulary import concepts

__all__ = ["fused"]

_NUMBER = re.compile(r"\d+")

Place = tuple[int, int, str]  # a pairing of stacks, a layer, and a sort of attention
Shapes = Counter[tuple[Place, str, tuple[int, ...]]]  # by the layer that they are in
Region = Callable[[str], Place]
Order = tuple[str, ...]  # of the parts of a fused tensor, such as query, key and value

_SINGLE = frozenset({"query", "key", "value", "out"})  # a unit that makes one of these does not stand for several
_QKV, _KV, _GATED = ("query", "key", "value"), ("key", "value"), ("gate", "up")


@dataclass(frozen=True, slots=True)
class _FusionGroup:
    """Units that may be one: `kind` is how, as in `Leaf`; `name` is the name of the whole."""

    kind: str
    name: str
    members: tuple[Unit, ...]
    wide: int = 1  # how many are concatenated before stacking
    order: Order = ()  # the roles of the members, where names tell them


_Fusion = tuple[_FusionGroup, dict[str, Leaf]]


def fused(
    source: Sequence[Unit],
    target: Sequence[Unit],
    ordered: tuple[bool, bool] = (True, True),
    placement: Placement | None = None,
) -> tuple[list[Unit], list[Unit]]:
    """Both sides, with what must be one made one.

    Args:
        ordered: for each side, whether it lists its units in the order of definition.
        placement: the stacks that correspond. Shapes are compared between their layers, and an index that both sides
            have is not stacked.
    """
    placed = placement or Placement()
    regions = _regions(placed, (source, target))
    sides = [with_roles(source, ordered[0]), with_roles(target, ordered[1])]
    orders = [frozenset(map(listed_parts, (u.path for u in side))) - {()} for side in sides]
    while True:
        best: tuple[int, int, list[_Fusion]] | None = None
        tables = [_shapes(s, region) for s, region in zip(sides, regions)]
        wholes: dict[tuple[int, Order], Shapes] = {}
        together = [_together(s, region) for s, region in zip(sides, regions)]
        for side in (0, 1):
            for groups in _candidates(sides[side], placed.counted(side), orders[1 - side]):
                order = groups[0].order or (_means(groups[0].members[0], "embedding"),)
                if (1 - side, order) not in wholes:
                    possible = [u for u in sides[1 - side] if _may_be(u, order)]
                    wholes[1 - side, order] = _shapes(possible, regions[1 - side])
                table = tables[1 - side], wholes[1 - side, order]
                gain, chosen = _gain(groups, tables[side], table, together[1 - side], regions[side])
                if gain > 0 and (best is None or gain > best[0]):
                    best = gain, side, chosen
        if best is None:
            break
        sides[best[1]] = _apply(sides[best[1]], best[2], ordered[best[1]])
    return sides[0], sides[1]


def _canonical(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


def _regions(placement: Placement, sides: tuple[Sequence[Unit], Sequence[Unit]]) -> tuple[Region, Region]:
    """Where each side's shapes are counted; by sort of attention in the layers where both sides tell the sorts."""
    sorts = [attention_sorts(u.template for u in side) for side in sides]
    told = [
        {placement.layer(n, u.path) for u in side if sorts[n].get(u.template) == "self"} for n, side in enumerate(sides)
    ]

    def region(side: int, path: str) -> Place:
        place = placement.layer(side, path)
        return (*place, sorts[side].get(_NUMBER.sub("#", path), "") if place in told[0] & told[1] else "")

    return partial(region, 0), partial(region, 1)


def _means(unit: Unit, concept: str) -> str:
    """The concept where the end of a unit's name means it, else nothing."""
    return concept if any(concept == c for segment in unit.segments[-2:] for c, _ in concepts(segment)) else ""


def _may_be(unit: Unit, order: Order) -> bool:
    """Whether a unit's name allows it to be the whole of these parts."""
    if len(order) == 1:
        return not _means(unit, "embedding") or bool(order[0])  # numbered units make a table only if they are tables
    listed = listed_parts(unit.path)
    if unit.roles & _SINGLE or (listed and listed != order):
        return False
    meant = {c for segment in unit.segments[-2:] for c, _ in concepts(segment)}
    other, own = ("mlp", "attention") if "key" in order else ("attention", "mlp")
    return "embedding" not in meant and not (other in meant and own not in meant)


def _shapes(units: Sequence[Unit], region: Region) -> Shapes:
    rows = ((region(_path(u)), u) for u in units)
    return Counter((at, role, _canonical(_plain(u, leaf.shape))) for at, u in rows for role, leaf in u.leaves.items())


def _path(unit: Unit) -> str:
    """The path of a unit, or of the first that was fused into it."""
    return unit.members[0] if unit.members else unit.path


def _together(units: Sequence[Unit], region: Region) -> frozenset[tuple[Any, ...]]:
    """Which shapes stand in one module: of the weight, and of each other role."""
    return frozenset(
        (_canonical(u.leaves["weight"].shape), region(_path(u)), role, _canonical(leaf.shape))
        for u in units
        if "weight" in u.leaves
        for role, leaf in u.leaves.items()
    )


def _plain(unit: Unit, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A projection that keeps its heads apart, or a stack of such ones, seen as the matrix that it is elsewhere."""
    deep = len(unit.weight.shape) - 3
    if deep not in (0, 1) or len(shape) < 2 or min(unit.weight.shape) == 1:
        return shape
    if unit.roles & set(_QKV) and len(shape) > 1 + deep:
        return (*shape[:-2], shape[-2] * shape[-1])
    if "out" in unit.roles and len(shape) == 3 + deep:
        return (*shape[:-3], shape[-3] * shape[-2], shape[-1])
    return shape


def _candidates(
    units: Sequence[Unit], counted: frozenset[str], orders: frozenset[Order]
) -> Iterator[list[_FusionGroup]]:
    """Groups that could be fused together, one list for each template.

    Args:
        counted: the paths before numbers that are no stacks.
        orders: in which the names of the other side list parts.
    """
    found: dict[tuple[str, str], list[_FusionGroup]] = {}
    families: dict[tuple[str, object], dict[str, Unit]] = {}
    gates: dict[str, dict[str, Unit]] = {}
    for unit in units:
        part = frame_of(unit.path)
        if part is not None and (part[0] == "gate" or part_of(unit.path)) and not unit.members:
            families.setdefault((parent(unit.path), part[1]), {})[part[0]] = unit
        for role in sorted(unit.roles & set(_GATED)):
            gates.setdefault(parent(unit.path), {})[role] = unit
    beside = _parallel(units, {path for (path, _), by_role in families.items() if by_role.keys() & set(_QKV)})

    def add(short: str, name: str, members: tuple[Unit, ...], order: Order) -> None:
        for kind in ("concat", "stack parts"):
            group = _FusionGroup(kind, name, members, order=order)
            found.setdefault((kind + short, members[0].template + members[-1].template), []).append(group)

    asked = sorted({_QKV, _KV} | {o for o in orders if len(o) > 1 and "up" not in o and set(_KV) & set(o)})
    for (path, frame), by_role in families.items():
        for order in asked:
            if all(r in by_role for r in order):
                short = "".join(r[0] for r in order)
                name = path + "_".join(short if w == "*" else w for w in frame)  # type: ignore[attr-defined]
                add(short, name, tuple(by_role[r] for r in order), order)
                for other in beside.get(path, ()) if order == _QKV else ():
                    members = (*(by_role[r] for r in order), other)
                    wide = _FusionGroup("concat", parent(path[:-1]) + "qkv_mlp", members)
                    found.setdefault(("wide", members[0].template + other.template), []).append(wide)
    gated = _GATED[::-1] if _GATED[::-1] in orders and _GATED not in orders else _GATED
    pairs: dict[str, tuple[Unit, ...]] = {}
    for path, by_role in gates.items():
        if len(by_role) == 2:
            pairs[path] = tuple(by_role[r] for r in gated)
            add("gate", f"{path}{'_'.join(gated)}_proj", pairs[path], gated)
    yield from found.values()
    yield from _stacks(units, list(pairs.values()), counted)


def _parallel(units: Sequence[Unit], paths: set[str]) -> dict[str, list[Unit]]:
    """For each module with queries: the first matrices of feed-forwards beside it, which some compute together."""
    found: dict[str, list[Unit]] = {}
    places: dict[str, list[str]] = {}
    for path in sorted(paths):
        for place in dict.fromkeys((path, parent(path[:-1]))):
            places.setdefault(place, []).append(path)
    for unit in units:
        named = {c for c, _ in concepts(split_path(unit.path)[1])}
        if unit.members or part_of(unit.path) is not None or not ("mlp" in named or unit.roles & {"up", "gate"}):
            continue
        if "down" in unit.roles or len(unit.weight.shape) != 2:
            continue
        for path in places.get(parent(unit.path), ()):
            found.setdefault(path, []).append(unit)
    return found


def _stacks(
    units: Sequence[Unit], pairs: Sequence[tuple[Unit, ...]], counted: frozenset[str]
) -> Iterator[list[_FusionGroup]]:
    """Units that differ in one number, from 0 on: alone, or with gate and up beside each other."""
    for kind, wide in (("stack", 1), ("concat index", 1), ("stack concat", 2)):
        found: dict[tuple[int, str, str], dict[str, list[tuple[int, tuple[Unit, ...]]]]] = {}
        listed = [(u,) for u in units if not u.members] if wide == 1 else pairs
        for members in listed:
            for place, number in enumerate(_NUMBER.finditer(members[0].path)):
                before, behind = members[0].path[: number.start()], members[0].path[number.end() :]
                if before in counted or not _ends(before, behind):
                    continue
                kind_of = (place, members[0].template, split_path(members[0].path)[1])
                found.setdefault(kind_of, {}).setdefault(before + behind, []).append((int(number[0]), members))
        for rows in found.values():
            groups = []
            for text, run in rows.items():
                run.sort(key=lambda r: r[0])
                if len(run) < 2 or [n for n, _ in run] != list(range(len(run))):
                    continue
                text = re.sub(r"[./_]([./])", r"\1", text)
                name = text if wide == 1 else split_path(text)[0] + "gate_up_proj"
                groups.append(_FusionGroup(kind, name, tuple(u for _, members in run for u in members), wide))
            if groups:
                yield groups


def _ends(before: str, behind: str) -> bool:
    """Whether a number is a word of its own between these texts."""
    return not before[-1:].isalnum() and not behind[:1].isalnum()


def _whole(group: _FusionGroup, role: str, opposite: Shapes, at: Place) -> Leaf | None:
    """The fused leaf in one role, None where the members do not fit or nothing opposite has its shape."""
    leaves = [u.leaves.get(role) for u in group.members]
    if any(leaf is None or leaf.fuse for leaf in leaves):
        return None
    present = [leaf for leaf in leaves if leaf is not None]
    shapes = [_plain(u, leaf.shape) for u, leaf in zip(group.members, present)]
    if len(set(map(len, shapes))) > 1 or (group.kind != "concat" and len(set(shapes)) > 1):
        return None
    for shape in _joined_shapes(group, shapes):
        if opposite.get((at, role, _canonical(shape))):
            parts = tuple(p for leaf in present for p in leaf.parts)
            return Leaf(shape, present[0].kind, parts, group.kind)
    return None


def _joined_shapes(group: _FusionGroup, shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """The shapes that a group may have as one."""
    if group.kind in ("stack", "stack parts"):
        yield (len(shapes), *shapes[0])
        return
    row = shapes[: group.wide] if group.wide > 1 else shapes
    for axis in range(len(row[0])):
        if all(s[:axis] + s[axis + 1 :] == row[0][:axis] + row[0][axis + 1 :] for s in row):
            shape = (*row[0][:axis], sum(s[axis] for s in row), *row[0][axis + 1 :])
            yield shape if group.wide == 1 else (len(shapes) // group.wide, *shape)


def _gain(
    groups: list[_FusionGroup],
    own: Shapes,
    opposite: tuple[Shapes, Shapes],
    together: frozenset[tuple[Any, ...]],
    region: Region,
) -> tuple[int, list[_Fusion]]:
    """By how much fusing brings the shapes together; which roles of which groups to fuse.

    Args:
        own, opposite: the shapes of both sides; of the other one all, and those that may be a whole.
    """
    total = 0
    there, wanted = opposite
    chosen: list[_Fusion] = []
    after = Counter(own)
    for group in groups:
        roles: dict[str, Leaf] = {}
        at = region(group.members[0].path)
        for role in group.members[0].leaves:
            whole = _whole(group, role, wanted, at)
            if whole is None:
                continue
            plain = (_plain(u, u.leaves[role].shape) for u in group.members)
            parts = Counter((at, role, _canonical(shape)) for shape in plain)
            key = (at, role, _canonical(whole.shape))
            # What stands beside a fused weight opposite is fused with it, though other tensors have its shape too.
            beside = "weight" in roles and (_canonical(roles["weight"].shape), *key) in together
            if after[key] >= there[key] and not beside:
                continue  # the other side holds no more of these than this one does already
            step = sum(abs(after[k] - there[k]) - abs(after[k] - n - there[k]) for k, n in parts.items())
            step += 1
            if step > 0 or beside:
                after.subtract(parts)
                after[key] += 1
                total += max(step, 0)
                roles[role] = whole
        if roles:
            chosen.append((group, roles))
    return total, chosen


def _apply(units: list[Unit], chosen: list[_Fusion], ordered: bool) -> list[Unit]:
    """The units with groups made one; what is not fused in a member stays where it was."""
    taken: dict[str, set[str]] = {}
    added = []
    for group, leaves in chosen:
        for unit in group.members:
            taken.setdefault(unit.path, set()).update(leaves)
        rank = min(u.order for u in group.members)
        added.append(Unit(group.name, leaves, rank, tuple(u.path for u in group.members)))
    kept = []
    for unit in units:
        left = {r: leaf for r, leaf in unit.leaves.items() if r not in taken.get(unit.path, ())}
        if left:
            kept.append(unit if len(left) == len(unit.leaves) else replace(unit, leaves=left))
    return with_roles(sorted([*kept, *added], key=lambda u: u.order), ordered)
