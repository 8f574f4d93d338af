"""Recipes from names and shapes: the matches between two sides, in as few rules as give them."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import Diagnostic
from ..language.folding import fold_groups
from ..language.recipe import Recipe
from ..specs import TensorSpec
from .assumptions import assumed
from .atoms import Atom, atoms, escaped, flats
from .claimed_keys import Book
from .depths import Depths, depths_of
from .drafts import RuleDraft, merged, unmerged
from .fallback import planned, says, surviving
from .matches import Matched, match
from .moves import TensorMove
from .reduction import Reduced, reduced
from .suggestion import Suggestion

Drafted = tuple[RuleDraft, Sequence[str]]  # and the rules that come before it

_SMALL = 4000  # with fewer keys on both sides together, all layers may be looked at

__all__ = ["arranged", "attempt", "by_names", "finish", "ordered", "written"]


def by_names(specs: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> Suggestion:
    """Return the recipe that names and shapes show, with what they leave open."""
    specs, wanted = arranged(specs), arranged(wanted)
    best = attempt(specs, wanted, cut=True)
    if len(specs) + len(wanted) < _SMALL and (best.problems or _cut_away(specs, wanted, best)):
        # What was left out may be what tells the layers apart, or what no rule for the others claims.
        whole = attempt(specs, wanted, cut=False)
        best = whole if whole.coverage > best.coverage else best
    return best


def _cut_away(source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec], found: Suggestion) -> bool:
    """Whether open targets stand in layers of which some were left out, and something of their size is still free."""
    _, two = reduced(source, target)
    free = {source[k].numel for k in found.unmatched_source}
    missing = [*found.unmatched_target, *(q.target for q in found.ambiguous)]
    return any(target[k].numel in free and two.stands_in(k) for k in missing)


def attempt(
    source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec], cut: bool, in_order: bool = False
) -> Suggestion:
    """The recipe that names and shapes show; with `in_order` the order of both sides counts as evidence."""
    depths = depths_of(source, target)
    one, two = reduced(_without(source, depths.source), _without(target, depths.target), cut)
    found = match(
        [(k, source[k]) for k in one.keys],
        [(k, target[k]) for k in two.keys],
        (in_order or ordered(source), in_order or ordered(target)),
    )
    return _written(source, target, found, one, two, depths)


def _without(specs: Mapping[str, TensorSpec], keys: Container[str]) -> Mapping[str, TensorSpec]:
    return {k: s for k, s in specs.items() if k not in keys}


def written(source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec], found: Matched) -> Suggestion:
    """The matches between two whole sides, as a recipe."""
    one, two = reduced(source, target, cut=False)
    return _written(source, target, found, one, two, Depths())


def _written(
    source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec], found: Matched, one: Reduced, two: Reduced,
    depths: Depths,
) -> Suggestion:  # fmt: skip
    used = {k for m in found.moves for k in m.sources}
    spare = [k for k in one.keys if k not in used]
    everything = [*one.expanded(_without(source, depths.source), spare), *depths.source]
    known = replace(one, keys=[*one.keys, *depths.source])
    drafts = _drafts(found, known, two, [*spare, *depths.source])
    within = _without(target, depths.target)
    made = finish(source, target, drafts, found, everything, lambda keys: two.expanded(within, keys))
    return replace(made, assumptions=(*made.assumptions, *depths.assumptions()))


def _drafts(found: Matched, one: Reduced, two: Reduced, spare: Sequence[str]) -> Iterator[Drafted]:
    """The shortest recipe first, then less and less merged ones, for where that one does not say what was found."""
    listed = _atoms(found, found.moves, one, two)
    draft = merged(listed, one.keys, spare)
    for flat in flats(found.moves, _loops(found)):
        # Everything under a flat index is nested first, so that the rules behind it can tell the stages apart.
        nested = [replace(m, sources=tuple(map(flat.nest, m.sources))) for m in found.moves]
        keys = Reduced([flat.nest(k) for k in one.keys], one.whole, {})
        staged = merged(_atoms(found, nested, keys, two), keys.keys, [flat.nest(k) for k in spare])
        if staged.length + 2 < draft.length and len(set(keys.keys)) == len(keys.keys):
            yield replace(staged, dims={**staged.dims, "block": list(flat.stages)}), [flat.rule]
    yield draft, []
    yield unmerged(listed), []


def _loops(found: Matched) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    # A nested source is spelled as the target is.
    return (lambda prefix: prefix in found.a.loops or prefix in found.b.loops), found.b.loops.__contains__


def _atoms(found: Matched, moves: Sequence[TensorMove], one: Reduced, two: Reduced) -> list[Atom]:
    side = {"s": one, "t": two}
    first, second = _loops(found)
    # A number that stands for others counts, though what it counts may be single tensors.
    loops = (lambda prefix: first(prefix) or prefix in one.stands_for), (lambda p: second(p) or p in two.stands_for)
    return atoms(moves, one.keys, loops, lambda prefix, seen: side[prefix[0]].values(prefix[1:], seen))


def arranged(specs: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
    """Return the specs in their own order where that is a model's definition, else sorted by key.

    Without this, the answer would depend on how a file or a dict happens to be shuffled.

    >>> spec = TensorSpec((2,), "F32")
    >>> list(arranged({"h.2.w": spec, "h.1.w": spec, "h.0.w": spec, "a": spec}))
    ['a', 'h.0.w', 'h.1.w', 'h.2.w']
    """
    return specs if ordered(specs) else dict(sorted(specs.items()))


def ordered(specs: Mapping[str, TensorSpec]) -> bool:
    """Whether the keys may be in the order of a model's definition: not the alphabet's, and layers one by one."""
    keys = list(specs)
    by_dtype: dict[str, list[str]] = {}
    for key, spec in specs.items():
        by_dtype.setdefault(spec.dtype, []).append(key)
    if keys == sorted(keys) or all(group == sorted(group) for group in by_dtype.values()):
        return False
    last: dict[str, tuple[int, ...]] = {}
    rising = falling = 0
    for key in keys:
        numbers = tuple(map(int, re.findall(r"[0-9]+", key)))
        template = re.sub(r"[0-9]+", "#", key)
        if template in last:
            rising += numbers > last[template]
            falling += numbers < last[template]
        last[template] = numbers
    return falling <= 0.1 * (rising + falling)


def finish(
    source: Mapping[str, TensorSpec],
    target: Mapping[str, TensorSpec],
    drafts: Iterable[Drafted],
    found: Matched,
    spare: Sequence[str],
    expand: Callable[[Sequence[str]], Sequence[str]] = list,
) -> Suggestion:
    """The first draft that does what was found, as a recipe over the whole source; what is left over is named."""
    whole: dict[str, Any] = {"drop": _patterns(spare, source)}
    ties = {escaped(k): escaped(v) for k, v in found.ties.items()}
    problems: tuple[Diagnostic, ...] = ()
    for draft, first in drafts:
        parts: dict[str, Any] = {"rules": draft.rules, "names": draft.names, "rest": draft.rest, "tie": ties}
        recipe, plan, why = planned(source, _parts(parts, {"dims": draft.dims, **whole}, first))
        if plan is not None and says(plan, target, found.moves):
            problems = ()
            break
        problems = problems or why
    else:
        recipe, plan = surviving(source, target, found.moves, found.ties)
        spare = tuple(k for k in source if k in set(plan.dropped))
    made = {*plan.specs, *plan.ties}
    missing = [k for k in target if k not in made]
    open_ = {k: replace(q, target=k) for q in found.questions for k in expand([q.target])}
    return Suggestion(
        recipe,
        sum(k in made for k in target) / max(1, len(target)),
        tuple(open_[k] for k in missing if k in open_),
        assumed(found, target, expand),
        tuple(spare),
        tuple(k for k in missing if k not in open_),
        problems=problems,
    )


def _parts(parts: Mapping[str, Any], whole: Mapping[str, Any], first: Sequence[str]) -> dict[str, Any]:
    """Of one recipe, or of one that goes on from what a first rule gives."""
    if not first:
        return {**parts, **whole}
    return {"rules": first, "rest": "keep", "stages": [Recipe(**parts)], **whole}


def _patterns(keys: Sequence[str], everything: Iterable[str]) -> tuple[str, ...]:
    """Patterns that match the keys and, of all there are, no others."""
    wanted = set(keys)
    book = Book(list(everything), frozenset())
    found: list[str] = []
    literal: list[str] = []
    for last in sorted({k.rpartition(".")[2] for k in keys}):
        anywhere = f"{{r...}}.{escaped(last)}"
        claimed = book.claimed(anywhere)
        if claimed and claimed <= wanted and len(fold_groups(sorted(claimed))) > 1:
            found.append(anywhere)
            keys = [k for k in keys if k not in claimed]
    covered = frozenset().union(*map(book.claimed, found))
    for group in fold_groups(keys):
        claimed = book.claimed(group.pattern)
        if claimed <= wanted and not claimed & covered:
            found.append(group.pattern)
            covered |= claimed
        else:
            shape = re.compile(re.sub(r"\\d\+|\d+", r"\\d+", re.escape(group.first)))
            literal += [k for k in keys if shape.fullmatch(k) and k in claimed]
    return (*found, *(escaped(k) for k in dict.fromkeys(literal) if k not in covered))
