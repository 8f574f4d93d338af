"""Tensors whose values differ between the sides: they follow their siblings, which are called alike but for numbers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import product

from ..language.folding import fold
from ..specs import TensorSpec
from .assumptions import Assumption
from .context import Context
from .equating import Equating
from .findings import Finding, Known, UnitLeaves
from .matches import Matched
from .moves import TensorMove
from .shapes import relations
from .vocabulary import STRUCTURAL, concepts

__all__ = ["alike_by_name", "casts", "changed", "differing"]

_EQUAL = 0.3  # from this share of equal tensors on, the others are taken for changed ones
_LIKE = 0.8  # share of explained variance from which on a tensor is taken for another one that was trained on
_NUMBER = re.compile(r"[0-9]+")


def casts(
    one: Mapping[str, TensorSpec], two: Mapping[str, TensorSpec], pairs: Iterable[tuple[str, str]]
) -> tuple[Assumption, ...]:
    """Return the tensors that hold the same values in another dtype."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for source, key in pairs:
        pair = one[source].dtype, two[key].dtype
        if pair[0] != pair[1]:
            groups[pair].append(key)
    return tuple(
        Assumption(
            "cast",
            f"{len(keys)} tensors are {a} in the source and {b} in the target, equal after the cast",
            tuple(keys),
        )
        for (a, b), keys in groups.items()
    )


def differing(keys: Sequence[str]) -> Iterator[Assumption]:
    """Return the tensors that keep the rule of their siblings though their values differ."""
    if keys:
        lines = [text for text, _ in fold(keys)]
        more = f", and {len(lines) - 4} more" if len(lines) > 4 else ""
        text = "values differ between the source and the target; these follow the rule of their siblings: "
        yield Assumption("values", text + ", ".join(lines[:4]) + more, tuple(keys))


def changed(
    sides: Equating, known: Known, named: Matched, leaves: tuple[UnitLeaves, UnitLeaves]
) -> list[tuple[Finding, list[str]]]:
    """The tensors that were changed on one side, such as by fine-tuning; none where little else is equal.

    A tensor goes where the others of its unit went. Within that it follows its siblings, which are called alike but for
    their numbers; one without siblings what it resembles.

    Returns:
        Findings, each with the targets that it makes otherwise than they are.
    """
    found: list[tuple[Finding, list[str]]] = []
    if len(known.made) < _EQUAL * len(sides.wanted):
        return found
    taken = Known(made=set(known.made), used=set(known.used))
    groups, units = _siblings(known.findings), _units(known.findings, leaves)
    for key in sides.wanted:
        for group in groups.get(_NUMBER.sub("#", key), ()) if key not in taken.made else ():
            finding = _like(group, key, sides)
            if finding is None or not _in_unit(finding, units, leaves):
                continue
            if _take(finding, sides, taken, found):
                break
    context = Context.of([*known.findings, *(f for f, _ in found)])
    for move in (*named.moves, *_resembling(sides, taken)):
        if taken.made & set(move.targets) or not context.agrees(move.sources, move.targets):
            continue
        finding = Finding((move,))
        if not _in_unit(finding, units, leaves) or sides.likeness(move) < _LIKE or not sides.differing(finding):
            continue  # what is equal and is not known yet is equal to others too
        kind = sides.kind(move.targets[0])
        if alike_by_name(finding) or not any(sides.print(0, k, kind).constant for k in move.sources):
            _take(finding, sides, taken, found)
    return found


def alike_by_name(finding: Finding) -> bool:
    """Return whether the modules of source and target have names of the same meaning."""
    meant = [
        {c for k in keys for segment in re.split(r"[./]", k)[:-1][-2:] for c, _ in concepts(segment)} - {STRUCTURAL}
        for keys in (finding.sources, finding.targets)
    ]
    return bool(meant[0] & meant[1])


def _resembling(sides: Equating, taken: Known) -> Iterator[TensorMove]:
    """Every way from a free tensor to an open one that shapes allow."""
    for key, spec in sides.wanted.items():
        for source, other in sides.specs.items() if key not in taken.made else ():
            if other.numel != spec.numel or source in taken.used:
                continue
            for way in relations(tuple(other.shape), tuple(spec.shape)):
                if way.kind in ("same", "transpose", "squeeze"):
                    yield TensorMove((source,), (key,), way.source, way.target)


def _take(finding: Finding, sides: Equating, taken: Known, found: list[tuple[Finding, list[str]]]) -> bool:
    """Add a finding, unless it is in the way of others or its ends hold the same values in another order."""
    if not taken.takes(finding):
        return False
    differs = sides.differing(finding)
    if differs and sides.permuted(finding):
        return False
    taken.add(finding)
    found.append((finding, differs))
    return True


def _units(findings: Sequence[Finding], leaves: tuple[UnitLeaves, UnitLeaves]) -> dict[str, str]:
    """The source's unit of each unit of the target of which a tensor is made of one tensor."""
    found: dict[str, str] = {}
    for one, two in _single(findings, leaves):
        found.setdefault(two, one)
    return found


def _in_unit(finding: Finding, units: Mapping[str, str], leaves: tuple[UnitLeaves, UnitLeaves]) -> bool:
    """Whether nothing else of the target's unit comes from another unit."""
    return all(units.get(two, one) == one for one, two in _single([finding], leaves))


def _single(findings: Iterable[Finding], leaves: tuple[UnitLeaves, UnitLeaves]) -> Iterator[tuple[str, str]]:
    """The units of both ends of findings between single tensors."""
    for finding in findings:
        if len(finding.sources) == len(finding.targets) == 1:
            ends = finding.sources[0], finding.targets[0]
            one, two = (side.roles.get(key, ("", ""))[0] for side, key in zip(leaves, ends))
            if one and two:
                yield one, two


def _siblings(findings: Sequence[Finding]) -> dict[str, list[list[Finding]]]:
    """Target's template -> findings that are alike but for numbers, the largest groups first."""
    groups: dict[object, list[Finding]] = defaultdict(list)
    for finding in findings:
        rules = tuple((m.left, m.right, m.fuse, m.sizes, m.dims) for m in finding.moves)
        ends = tuple(_NUMBER.sub("#", k) for k in (*finding.sources, "", *finding.targets))
        groups[rules, ends].append(finding)
    found: dict[str, list[list[Finding]]] = defaultdict(list)
    for group in sorted(groups.values(), key=len, reverse=True):
        for template in dict.fromkeys(_NUMBER.sub("#", k) for k in group[0].targets):
            found[template].append(group)
    return found


def _like(siblings: Sequence[Finding], key: str, sides: Equating) -> Finding | None:
    """The siblings' finding with the numbers of another target key; None where its shapes or keys are others."""
    model = siblings[0]
    template = _NUMBER.sub("#", key)
    numbers = [int(n) for n in _NUMBER.findall(key)]
    for at in (n for n, k in enumerate(model.targets) if _NUMBER.sub("#", k) == template):
        names: list[dict[str, str]] = []
        for side, specs in enumerate((sides.specs, sides.wanted)):
            table: dict[str, str] = {}
            for n, old in enumerate((model.sources, model.targets)[side]):
                beside = (model.sources, model.targets)[side]
                rows = [((f.sources, f.targets)[side][n], f.targets[at]) for f in siblings]
                fits = (
                    k
                    for k in _renumbered(rows, numbers, _counting(old, beside))
                    if k in specs and specs[k].shape == specs[old].shape
                )
                new = next(fits, None)
                if new is not None:
                    table[old] = new
            names.append(table)
        ends = model.sources, model.targets
        whole = all(len({*table.values()}) == len(keys) for table, keys in zip(names, ends))
        if whole and names[1][model.targets[at]] == key:
            return model.renamed(names[0], names[1], sides.specs, sides.wanted)
    return None


def _counting(key: str, keys: Sequence[str]) -> set[int]:
    """The numbers of a key that tell it from the others of its finding."""
    own = _NUMBER.findall(key)
    kin = [_NUMBER.findall(k) for k in keys if k != key and _NUMBER.sub("#", k) == _NUMBER.sub("#", key)]
    return {n for n, text in enumerate(own) if any(others[n] != text for others in kin)}


def _renumbered(rows: Sequence[tuple[str, str]], numbers: Sequence[int], fixed: Container[int]) -> Iterator[str]:
    """The keys whose numbers follow from a target's as they do in all rows: equal, shifted, or always the same."""
    tables = [([int(n) for n in _NUMBER.findall(k)], [int(n) for n in _NUMBER.findall(t)]) for k, t in rows]
    choices: list[list[int]] = []
    for place in range(len(tables[0][0])):
        column = [own[place] for own, _ in tables]
        ways = [(p, column[0] - tables[0][1][p]) for p in range(len(numbers))]
        shifts = [(p, c) for p, c in ways if all(own[place] == t[p] + c for own, t in tables)]
        # A number that follows the target's own is likelier than one that happens to be the same everywhere.
        moving = [(p, c) for p, c in shifts if len(tables) == 1 or len({t[p] for _, t in tables}) > 1]
        moving.sort(key=lambda s: abs(s[1]))
        made = [numbers[p] + c for p, c in moving if place not in fixed or len(tables) > 1] + (
            [column[0]] if len(set(column)) == 1 else []
        )
        choices.append(list(dict.fromkeys(made)))
    for listed in product(*choices):
        fresh = iter(listed)
        yield _NUMBER.sub(lambda _, fresh=fresh: str(next(fresh)), rows[0][0])  # type: ignore[misc]
