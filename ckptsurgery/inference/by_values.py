"""Recipes from values: where both sides hold the same weights, what became of each is read off the data, and proved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from .assumptions import Assumption
from .by_names import arranged, ordered
from .context import Context
from .element_maps import places_between
from .equating import Equating
from .findings import Finding, Known, UnitLeaves, companions
from .matches import Matched, match
from .moves import TensorMove
from .recipe_stages import StagedCut, alone, staged
from .regrouping import regrouped
from .siblings import alike_by_name, casts, changed, differing
from .slices import SliceTable
from .suggestion import Suggestion
from .views import CutView, ViewedSide, complete, flattened, unstacked, with_views
from .wholes import WholeMoves, axes_between, completed, moves_of

__all__ = ["by_values"]

_NUMBER = re.compile(r"[0-9]+")


def by_values(source: Any, target: Any) -> Suggestion:
    """Return the exact recipe between two sides that hold the same weights.

    What names suggest is tried on the data first; what fails, or is open, is looked for by its values. Tensors are read
    one by one: what is held at a time is one of the target with what it is made of, whatever the sides' sizes.
    """
    with ExitStack() as opened:
        one, two = (_opened(side, opened) for side in (source, target))
        specs, wanted = arranged(one.specs), arranged(two.specs)
        found = match(list(specs.items()), list(wanted.items()), (ordered(specs), ordered(wanted)))
        sides = Equating(one, two, specs, wanted)
        search = _Search(sides, found, (UnitLeaves(specs), UnitLeaves(wanted)), Known())
        search.run()
        known, differs = search.known, []
        while tuned := changed(sides, known, found, search.leaves) or list(search.changed_parts()):
            for finding, keys in (row for row in tuned if known.takes(row[0])):
                known.add(finding)
                differs += keys
            search.companions()
        seen = _recut(sides, found, known)
        result = seen.suggested(sides, found, known)
        taken = (
            *casts(one.specs, two.specs, seen.pairs(known)),
            *search.assumptions(), *differing(differs),
        )  # fmt: skip
        return replace(result, evidence="values", assumptions=taken)


def _opened(source: Any, opened: ExitStack) -> Checkpoint:
    """A side, closed with the stack if it was opened here."""
    checkpoint = open_checkpoint(source)
    if checkpoint is not source:
        opened.enter_context(checkpoint)
    return checkpoint


@dataclass
class _Search:
    """The search for what values decide, from what decides itself to what follows from it."""

    sides: Equating
    named: Matched
    leaves: tuple[UnitLeaves, UnitLeaves]
    known: Known

    def __post_init__(self) -> None:
        self.untold: list[str] = []

    def run(self) -> None:
        """Add to what is known until nothing follows from it any more."""
        later = []
        for finding in self._whole([Finding((m,)) for m in self.named.moves]):
            if self._tells(finding):
                self.known.add(finding)
            else:
                later.append(finding)
        self._singles()
        self._wholes(True)
        self._wholes(False)
        self._swaps()
        self.companions()
        self._equals(later)
        self.companions()
        self._copies()

    def assumptions(self) -> Iterator[Assumption]:
        """Return the tensors that values do not decide."""
        if self.untold:
            text = "other tensors hold the same value everywhere; these go by their names and by their neighbours"
            yield Assumption("equal", text, tuple(self.untold))

    def _whole(self, tried: list[Finding]) -> list[Finding]:
        """Return the findings that hold, but for those that split a tensor of which another part does not."""
        proved = [f for f in tried if self.sides.holds(f)]
        lost = {k for f in tried if f not in proved for k in f.sources}
        return [f for f in proved if not (len(f.targets) > 1 and lost & set(f.sources))]

    def _tells(self, finding: Finding) -> bool:
        """Whether values tell a finding from others: not where a tensor holds one value that others hold too."""
        kind = self.sides.kind(finding.targets[0])
        return not any(self.sides.print(0, k, kind).constant for k in finding.sources)

    def _open(self) -> list[str]:
        return [k for k in self.sides.wanted if k not in self.known.made]

    def _free(self) -> list[str]:
        return [k for k in self.sides.specs if k not in self.known.used]

    def _singles(self) -> None:
        """Tensors that hold the values of one tensor of the source, in any order that axes say."""
        context = Context.of(self.known.findings)
        for key in self._open():
            if self.sides.print(1, key, self.sides.kind(key)).constant:
                continue
            fresh = [k for k in self.sides.alike(key) if k not in self.known.used]
            for candidate in sorted(fresh, key=lambda k: (not context.agrees([k], [key]), -_shared(k, key))):
                axes = self._axes(candidate, key)
                if axes is not None:
                    self.known.add(Finding((TensorMove((candidate,), (key,), *axes[:2], dims=tuple(axes[2].items())),)))
                    break

    def _axes(self, source: str, target: str) -> tuple[str, str, dict[str, int]] | None:
        kind = self.sides.kind(target)
        one, two = self.sides.bits(0, source, kind), self.sides.bits(1, target, kind)
        places = places_between(one, two)
        return None if places is None else axes_between(places, one.shape, two.shape)

    def _wholes(self, forward: bool) -> None:
        """Tensors that several tensors of the other side fill: of the target (forward), then of the source."""
        for key, spec, table, load, whole in self._candidates(forward):
            numbers = table.fill(whole, load)
            made = None if numbers is None else moves_of(key, spec, numbers, forward)
            if made is not None and self.known.takes(_finding(made, forward)):
                self.known.add(_finding(made, forward))

    def changed_parts(self) -> Iterator[tuple[Finding, list[str]]]:
        """Wholes of which most parts are known and the others were changed, with what is made otherwise than it is."""
        context = Context.of(self.known.findings)
        for forward in (True, False):
            for key, spec, table, load, whole in self._candidates(forward):
                numbers = table.most_of(whole, load)
                if numbers is None:
                    continue
                templates = {_NUMBER.sub("#", k) for k in numbers.parts}
                others = [
                    k
                    for k, shape in zip(table.keys, table.shapes)
                    if k not in numbers.parts and shape == numbers.shapes[0] and _NUMBER.sub("#", k) in templates
                ]
                made = completed(key, spec, numbers, others, forward)
                if made is None:
                    continue
                finding = _finding(made, forward)
                if self.known.takes(finding) and context.agrees(finding.sources, finding.targets):
                    yield finding, self.sides.differing(finding)

    def _candidates(self, forward: bool) -> Iterator[tuple[str, TensorSpec, SliceTable, Callable[[str], Any], Any]]:
        """The tensors that may be wholes, each with the slices of those that may be its parts, and its values."""
        sides = self.sides
        for kind in dict.fromkeys(sides.kind(k) for k in self._open()):
            left = [k for k in self._open() if sides.kind(k) == kind and not sides.print(1, k, kind).constant]
            free = [k for k in self._free() if not sides.print(0, k, kind).constant]
            small, large = (free, left) if forward else (left, free)
            ends = (sides.specs, sides.wanted) if forward else (sides.wanted, sides.specs)
            load = sides.loader(int(not forward), kind)
            table = SliceTable.of({k: ends[0][k].shape for k in small}, load)
            most = sum(prod(shape) for shape in table.shapes)
            for key in large:
                if ends[1][key].numel <= most:
                    yield key, ends[1][key], table, load, sides.bits(int(forward), key, kind)

    def _swaps(self) -> None:
        """Tensors that are the blocks of one tensor of the source, in another order or in other groups."""
        for key in self._open():
            if self.sides.print(1, key, self.sides.kind(key)).constant:
                continue
            for candidate in (k for k in self.sides.alike(key) if k not in self.known.used):
                finding = self._regrouped(candidate, key)
                if finding is not None:
                    self.known.add(finding)
                    break

    def _regrouped(self, source: str, target: str) -> Finding | None:
        kind = self.sides.kind(target)
        places = places_between(self.sides.bits(0, source, kind), self.sides.bits(1, target, kind))
        if places is None:
            return None
        return regrouped((source, self.sides.specs[source]), (target, self.sides.wanted[target]), places)

    def companions(self) -> None:
        """Add the neighbours of the tensors that are known, which move as they do."""
        listed = list(self.known.findings)
        while listed:
            finding = listed.pop(0)
            sides = self.sides
            for twin in companions(
                finding, self.leaves, sides.specs, sides.wanted, sides.holds, self.known.takes, self.known.made
            ):
                self.known.add(twin)
                listed.append(twin)

    def _equals(self, named: list[Finding]) -> None:
        """Tensors of one value: what the layers around them, and their names, leave no choice for."""
        context = Context.of(self.known.findings)
        for finding in (f for f in named if self.named.placed.isdisjoint(f.targets) or alike_by_name(f)):
            if self.known.takes(finding) and context.agrees(finding.sources, finding.targets) and self._beside(finding):
                self._take_untold(finding)
        listed = [k for k in self._open() if self.sides.print(1, k, self.sides.kind(k)).constant]
        pairs = {key: [k for k in self.sides.alike(key) if self._may(k, key, context)] for key in listed}
        for key, sources in pairs.items():
            if len(sources) == 1 and sum(sources[0] in others for others in pairs.values()) == 1:
                finding = Finding((TensorMove((sources[0],), (key,)),))
                if self.sides.specs[sources[0]].shape == self.sides.wanted[key].shape and self._beside(finding):
                    self._take_untold(finding)

    def _may(self, source: str, target: str, context: Context) -> bool:
        """Whether a free tensor could be a target's as far as layers and roles show."""
        roles = [side.roles.get(k, ("", ""))[1] for side, k in zip(self.leaves, (source, target))]
        return source not in self.known.used and roles[0] == roles[1] and context.agrees([source], [target])

    def _beside(self, finding: Finding) -> bool:
        """Whether nothing that values tell is open beside a finding's targets: a bias goes with its weight."""
        for key in finding.targets:
            for role in self.leaves[1].others(key):
                other = self.leaves[1].beside(key, role)
                if other in self._left and not self.sides.print(1, other, self.sides.kind(other)).constant:
                    return False
        return True

    @property
    def _left(self) -> set[str]:
        return set(self._open())

    def _take_untold(self, finding: Finding) -> None:
        self.known.add(finding)
        self.untold += finding.targets

    def _copies(self) -> None:
        """Tensors that hold the values of one that has gone somewhere else already: they are tied to its target."""
        first = {m.sources[0]: m.targets[0] for m in self.known.moves
                 if len(m.sources) == len(m.targets) == 1 and not m.left}  # fmt: skip
        for key in self._open():
            if self.sides.print(1, key, self.sides.kind(key)).constant:
                continue
            for candidate in self.sides.alike(key):
                if candidate in first and self._axes(candidate, key) == ("", "", {}):
                    self.known.ties[key] = first[candidate]
                    self.known.made.add(key)
                    break


@dataclass(frozen=True)
class _Recut:
    """What was found between sides of which some tensors are seen in another cut.

    Args:
        source, target: the views, of tensors that the findings use or make.
        findings: between what is seen.
    """

    source: tuple[CutView, ...] = ()
    target: tuple[CutView, ...] = ()
    findings: tuple[Finding, ...] = ()

    def suggested(self, sides: Equating, found: Matched, known: Known) -> Suggestion:
        """The recipe of all that is known: views of the source first, those of the target last."""
        specs, wanted = sides.specs, sides.wanted
        seen = with_views(specs, self.source), with_views(wanted, self.target)
        if self.findings:
            found = match(list(seen[0].items()), list(seen[1].items()), (ordered(seen[0]), ordered(seen[1])))
        listed = [*known.findings, *self.findings]
        cut = StagedCut(
            [c for f in listed for c in f.splits], [c for f in listed for c in f.joins],
            [m for f in listed if f.splits or f.joins for m in f.moves],
        )  # fmt: skip
        moves = [m for f in listed if not f.splits and not f.joins for m in f.moves]
        whole = replace(found, moves=moves, ties=known.ties, questions=(), placed=frozenset())
        result = staged(*seen, whole, cut)
        recipe = result.recipe
        if self.source:
            recipe = alone([view.move(True) for view in self.source], specs).then(recipe)
        if self.target:
            recipe = recipe.then(alone([view.move(False) for view in self.target], seen[1]))
        made = known.made | {view.key for view in self.target} | {k for f in self.findings for k in f.targets}
        left = tuple(key for key in wanted if key not in made)
        spare = tuple(key for key in result.unmatched_source if key in specs)
        coverage = 1 - len(left) / max(1, len(wanted))
        return replace(result, recipe=recipe, coverage=coverage, unmatched_source=spare, unmatched_target=left)

    def searched(
        self, sides: Equating, found: Matched, left: Sequence[Mapping[str, TensorSpec]], views: Sequence[list[CutView]]
    ) -> _Recut:
        """The same with what is found between what is left of both sides, seen so."""
        specs, wanted = (with_views(side, cut) for side, cut in zip(left, views))
        one, two = (ViewedSide(side, cut) for side, cut in zip((sides.source, sides.target), views))
        named = replace(found, moves=[], ties={}, questions=(), placed=frozenset())
        search = _Search(Equating(one, two, specs, wanted), named, (UnitLeaves(specs), UnitLeaves(wanted)), Known())
        search.run()
        kept = complete(search.known.findings, views[1])
        ends = {k for f in kept for k in f.sources}, {k for f in kept for k in f.targets}
        used = [[v for v in cut if end & v.specs.keys()] for cut, end in zip(views, ends)]
        return _Recut((*self.source, *used[0]), (*self.target, *used[1]), (*self.findings, *kept))

    def pairs(self, known: Known) -> Iterator[tuple[str, str]]:
        """A source of each target that is made."""
        whole = [{key: view.key for view in views for key in view.specs} for views in (self.source, self.target)]
        for finding in (*known.findings, *self.findings):
            for key in finding.targets:
                yield whole[0].get(finding.sources[0], finding.sources[0]), whole[1].get(key, key)


def _recut(sides: Equating, found: Matched, known: Known) -> _Recut:
    """Look for what is left, with the tensors that are left seen in other cuts."""
    result = _Recut()
    for cut in (flattened, unstacked):
        for both in ((True, False), (False, True), (True, True)):
            taken = {k for f in result.findings for k in (*f.sources, *f.targets)}
            taken |= {view.key for view in (*result.source, *result.target)}
            free = {k: s for k, s in sides.specs.items() if k not in known.used and k not in taken}
            left = {k: s for k, s in sides.wanted.items() if k not in known.made and k not in taken}
            views = [cut(side) if seen else [] for side, seen in zip((free, left), both)]
            if all(map(bool, views)) or (any(views) and not all(both)):
                result = result.searched(sides, found, (free, left), views)
    return result


def _finding(made: WholeMoves, forward: bool) -> Finding:
    cuts = () if made.cut is None else (made.cut,)
    return Finding(made.moves, *(((), cuts) if forward else (cuts, ())))


def _shared(one: str, two: str) -> int:
    """How many segments two keys share: of tensors with the same values, the namesake is likelier."""
    return len(set(one.replace("/", ".").split(".")) & set(two.replace("/", ".").split(".")))
