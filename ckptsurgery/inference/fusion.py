"""What one side holds apart and the other as one: query, key and value; gate and up; experts; found by counting shapes.

A fusion is taken for all layers at once, and only if it makes the two sides' shapes more alike and the fused shape
exists opposite. It is taken role by role: weights may be fused while biases stay apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .placement import Placement
from .roles import parent, part_of, with_roles
from .units import Leaf, Unit, split_path
from .vocabulary import concepts

__all__ = ["fused"]

Shapes = Counter[tuple[int, str, tuple[int, ...]]]  # by the region that they are in
Region = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class _FusionGroup:
    """Units that may be one: `kind` is "concat", "stack" or "stack concat"; `name` is what the whole is called."""

    kind: str
    name: str
    members: tuple[Unit, ...]
    wide: int = 1  # how many are concatenated before stacking


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
    regions: tuple[Region, Region] = (partial(placed.region, 0), partial(placed.region, 1))
    sides = [with_roles(source, ordered[0]), with_roles(target, ordered[1])]
    for _ in range(6):
        best: tuple[int, int, list[_Fusion]] | None = None
        tables = [_shapes(s, region) for s, region in zip(sides, regions)]
        together = [_together(s, region) for s, region in zip(sides, regions)]
        for side in (0, 1):
            for groups in _candidates(sides[side], placed.counted(side)):
                gain, chosen = _gain(groups, tables[side], tables[1 - side], together[1 - side], regions[side])
                if gain > 0 and (best is None or gain > best[0]):
                    best = gain, side, chosen
        if best is None:
            break
        sides[best[1]] = _apply(sides[best[1]], best[2], ordered[best[1]])
    return sides[0], sides[1]


def _canonical(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


def _shapes(units: Sequence[Unit], region: Region) -> Shapes:
    rows = ((region(u.path), u) for u in units)
    return Counter((at, role, _canonical(_plain(u, leaf.shape))) for at, u in rows for role, leaf in u.leaves.items())


def _together(units: Sequence[Unit], region: Region) -> frozenset[tuple[Any, ...]]:
    """Which shapes stand in one module: of the weight, and of each other role."""
    return frozenset(
        (_canonical(u.leaves["weight"].shape), region(u.path), role, _canonical(leaf.shape))
        for u in units
        if "weight" in u.leaves
        for role, leaf in u.leaves.items()
    )


def _plain(unit: Unit, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A projection that keeps its heads apart, seen as the matrix that it is elsewhere."""
    if unit.roles & {"query", "key", "value"} and len(shape) > 1 and len(unit.weight.shape) == 3:
        return (*shape[:-2], shape[-2] * shape[-1])
    if "out" in unit.roles and len(shape) == 3:
        return (shape[0] * shape[1], shape[2])
    return shape


def _candidates(units: Sequence[Unit], counted: frozenset[str]) -> Iterator[list[_FusionGroup]]:
    """Groups that could be fused together, one list for each template; the numbers behind `counted` are no stacks."""
    found: dict[tuple[str, str], list[_FusionGroup]] = {}
    families: dict[tuple[str, object], dict[str, Unit]] = {}
    gates: dict[str, dict[str, Unit]] = {}
    for unit in units:
        part = part_of(unit.path)
        if part is not None and not unit.members:
            families.setdefault((parent(unit.path), part[1]), {})[part[0]] = unit
        for role in sorted(unit.roles & {"gate", "up"}):
            gates.setdefault(parent(unit.path), {})[role] = unit
    beside = _parallel(units, {path for path, _ in families})
    for (path, frame), by_role in families.items():
        for wanted, short in ((("query", "key", "value"), "qkv"), (("key", "value"), "kv")):
            if all(r in by_role for r in wanted):
                name = path + "_".join(short if w == "*" else w for w in frame)  # type: ignore[attr-defined]
                group = _FusionGroup("concat", name, tuple(by_role[r] for r in wanted))
                found.setdefault((short, group.members[0].template), []).append(group)
                for other in beside.get(path, ()) if short == "qkv" else ():
                    wide = _FusionGroup("concat", parent(path[:-1]) + "qkv_mlp", (*group.members, other))
                    found.setdefault(("wide", group.members[0].template + other.template), []).append(wide)
    pairs: dict[str, _FusionGroup] = {}
    for path, by_role in gates.items():
        if "gate" in by_role and "up" in by_role:
            pairs[path] = _FusionGroup("concat", path + "gate_up_proj", (by_role["gate"], by_role["up"]))
            found.setdefault(("gate", by_role["gate"].template), []).append(pairs[path])
    yield from found.values()
    yield from _stacks(units, pairs, counted)


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
    units: Sequence[Unit], pairs: dict[str, _FusionGroup], counted: frozenset[str]
) -> Iterator[list[_FusionGroup]]:
    """Units that differ in one number, from 0 on: alone, or with gate and up beside each other."""
    for wide in (1, 2):
        found: dict[tuple[int, str, str], dict[str, list[tuple[int, tuple[Unit, ...]]]]] = {}
        listed = [(u,) for u in units if not u.members] if wide == 1 else [g.members for g in pairs.values()]
        for members in listed:
            for place, text, number in _numbers(members[0].path):
                if ".".join([*members[0].path.split(".")[:place], ""]) in counted:
                    continue
                kind_of = (place, members[0].template, split_path(members[0].path)[1])
                found.setdefault(kind_of, {}).setdefault(text, []).append((number, members))
        for rows in found.values():
            groups = []
            for text, run in rows.items():
                run.sort(key=lambda r: r[0])
                if len(run) < 2 or [n for n, _ in run] != list(range(len(run))):
                    continue
                kind = "stack" if wide == 1 else "stack concat"
                name = text if wide == 1 else split_path(text)[0] + "gate_up_proj"
                groups.append(_FusionGroup(kind, name, tuple(u for _, members in run for u in members), wide))
            if groups:
                yield groups


def _numbers(path: str) -> Iterator[tuple[int, str, int]]:
    """For each segment that is a number: its place, the path without it, and the number."""
    segments = path.split(".")
    for i, segment in enumerate(segments):
        if segment.isdigit():
            yield i, ".".join(segments[:i] + segments[i + 1 :]), int(segment)


def _whole(group: _FusionGroup, role: str, opposite: Shapes, at: int) -> Leaf | None:
    """The fused leaf in one role, None where the members do not fit or nothing opposite has its shape."""
    leaves = [u.leaves.get(role) for u in group.members]
    if any(leaf is None or leaf.fuse for leaf in leaves):
        return None
    present = [leaf for leaf in leaves if leaf is not None]
    shapes = [leaf.shape for leaf in present]
    if len(set(map(len, shapes))) > 1 or (group.kind != "concat" and len(set(shapes)) > 1):
        return None
    for axis in range(len(shapes[0])):
        row = shapes[: group.wide] if group.kind != "concat" else shapes
        if any(s[:axis] + s[axis + 1 :] != row[0][:axis] + row[0][axis + 1 :] for s in row):
            continue
        shape = (*row[0][:axis], sum(s[axis] for s in row), *row[0][axis + 1 :])
        if group.kind != "concat":
            shape = (len(shapes) // group.wide, *(row[0] if group.wide == 1 else shape))
        if opposite.get((at, role, _canonical(shape))):
            parts = tuple(p for leaf in present for p in leaf.parts)
            return Leaf(shape, present[0].kind, parts, group.kind)
    return None


def _gain(
    groups: list[_FusionGroup],
    own: Shapes,
    opposite: Shapes,
    together: frozenset[tuple[Any, ...]],
    region: Region,
) -> tuple[int, list[_Fusion]]:
    """By how much fusing brings the shapes together; which roles of which groups to fuse."""
    total = 0
    chosen: list[_Fusion] = []
    after = Counter(own)
    for group in groups:
        roles: dict[str, Leaf] = {}
        at = region(group.name if group.kind == "concat" else group.members[0].path)
        for role in group.members[0].leaves:
            whole = _whole(group, role, opposite, at)
            if whole is None:
                continue
            parts = Counter((at, role, _canonical(p.shape)) for p in whole.parts)
            key = (at, role, _canonical(whole.shape))
            # What stands beside a fused weight opposite is fused with it, though other tensors have its shape too.
            beside = "weight" in roles and (_canonical(roles["weight"].shape), *key) in together
            if after[key] >= opposite[key] and not beside:
                continue  # the other side holds no more of these than this one does already
            step = sum(abs(after[k] - opposite[k]) - abs(after[k] - n - opposite[k]) for k, n in parts.items())
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
