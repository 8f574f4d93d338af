"""Which rule takes which source key: every key once, and what is left over."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import Diagnostic, RecipeError, Remedy
from ..language.covering import exact_patterns
from ..language.folding import fold, fold_groups
from ..language.grouping import KeyGroup, group_keys, template
from ..language.keys import KeyPattern
from ..specs import TensorSpec
from ..wording import counted
from .copied_keys import CopiedKeys, KeyPath
from .expanding import BoundPattern, ResolvedRule, Rest, Stage
from .joining import partners_of
from .matching import MatchedColumns, match_group
from .misspelling import meant_instead, notation_advice

__all__ = ["Claims", "claim", "near_rules", "unexpected"]


@dataclass
class Claims:
    """The keys that each rule takes.

    Args:
        terms: for each rule and each of its source terms, what it matched.
        dropped: source key -> text of the drop that took it.
        same: source key that is left out -> the key it must equal.
        rests: what the fallbacks took: (rule, matches).
        leftover: keys that nothing names.
        shared: keys that a rule reads beside the one that claims them, and that nothing claims.
        lost: key of a tensor that cannot be read -> text of the drop that took it.
        unread: keys of tensors that cannot be read, and that nothing drops.
        unread_terms: as `terms`, of tensors that cannot be read.
    """

    terms: list[list[list[MatchedColumns]]]
    dropped: dict[str, str] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    rests: list[tuple[ResolvedRule, MatchedColumns]] = field(default_factory=list)
    leftover: list[str] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    unread_terms: list[list[list[MatchedColumns]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Claim:
    pattern: KeyPattern
    text: str
    place: str | None
    rule: int | None = None
    term: int = 0
    said: BoundPattern | None = None
    same: bool = False
    makes: KeyPattern | None = None
    shared: bool = False
    whole: frozenset[str] | None = None  # of a term whose keys need partners: those that have them

    @property
    def optional(self) -> bool:
        """Whether what is said may match nothing."""
        return self.said is not None and self.said.optional

    @property
    def edges(self) -> tuple[str, str]:
        """How every template begins and ends whose keys may match; a number may run on into the next piece."""
        return template(self.pattern.prefix).rstrip("0"), template(self.pattern.suffix).lstrip("0")


def claim(
    stage: Stage,
    specs: Iterable[str],
    problems: list[Diagnostic],
    tied: Mapping[str, str] = {},
    wanted: Collection[str] = (),
    unreadable: Collection[str] = (),
) -> Claims:
    """Hand out the keys of a checkpoint to the rules, drops and fallbacks of a stage.

    Args:
        tied: key -> one key for all that are one tensor with it.
        wanted: the target's keys, where there is a target.
        unreadable: keys of tensors that cannot be read: drops take them, and rules do not.
    """
    groups = group_keys(specs)
    candidates = _candidates(stage, groups)
    exact: dict[str, list[int]] = {}
    open_ones: list[tuple[int, str, str]] = []
    for number, candidate in enumerate(candidates):
        if candidate.pattern.captures:
            open_ones.append((number, *candidate.edges))
        else:
            exact.setdefault(template(candidate.pattern.prefix), []).append(number)
    claims = Claims([[[] for _ in b.rule.sources] for b in stage.rules])
    claims.unread_terms = [[[] for _ in b.rule.sources] for b in stage.rules]
    copied = _copied_keys(stage, candidates, groups)
    used: set[int] = set()
    twice: dict[tuple[int, int], list[str]] = {}

    def near(group: KeyGroup) -> dict[int, _Claim]:
        # most pairs of group and pattern end here
        text = group.template
        numbers = [n for n, head, tail in open_ones if text.startswith(head) and text.endswith(tail)]
        return {n: candidates[n] for n in sorted([*numbers, *exact.get(text, ())])}

    for group in groups:
        _claim_group(group, near(group), claims, used, twice, problems, tied, wanted, copied)
    if unreadable:
        for group in group_keys(unreadable):
            _claim_unreadable(group, near(group), claims, used)
        _drop_unreadable(stage.rests, [key for key in unreadable if key not in claims.lost], claims)
    for (a, b), keys in twice.items():
        problems.append(_claimed_twice(candidates[a], candidates[b], keys))
    _check_unused(stage, candidates, used, claims.leftover, problems)
    if claims.leftover and stage.rests:
        _give_rest(stage.rests, claims, problems)
    claims.shared.intersection_update(claims.leftover)
    claims.leftover = [key for key in claims.leftover if key not in claims.shared]
    return claims


def _candidates(stage: Stage, groups: list[KeyGroup]) -> list[_Claim]:
    """Return all that may claim keys: the source terms of rules first, then drops, then keys that must be equal."""
    partners = partners_of(stage.rules, groups) if any(b.rule.joined for b in stage.rules) else {}
    found = [
        _Claim(
            t.pattern,
            b.text,
            b.rule.place,
            n,
            k,
            makes=b.rule.targets[0].pattern,
            shared=t.shared,
            whole=partners.get((n, k)),
        )
        for n, b in enumerate(stage.rules)
        for k, t in enumerate(b.rule.sources)
    ]
    found += [_Claim(d.pattern, f"drop {d.text}", d.place, said=d) for d in stage.drops]
    return found + [_Claim(d.pattern, f"same {d.text}", d.place, said=d, same=True) for d in stage.sames]


def _copied_keys(stage: Stage, candidates: Sequence[_Claim], groups: Sequence[KeyGroup]) -> CopiedKeys | None:
    """The decision about copies; None where no rule makes a target that another makes as well."""
    rules = [bound.rule for bound in stage.rules]
    if not any(term.shared for rule in rules for term in rule.targets):
        return None
    straight = [len(rule.sources) == len(rule.targets) == 1 and not rule.sources[0].shared for rule in rules]
    ways = [KeyPath(r.sources[0].pattern, r.targets[0].pattern, r.targets[0].shared) for r in rules]
    paths = {
        number: ways[one.rule] for number, one in enumerate(candidates) if one.rule is not None and straight[one.rule]
    }
    others = [rest.rule.rule for rest in stage.rests if rest.rule is not None]
    rests = [KeyPath(rule.sources[0].pattern, rule.targets[0].pattern) for rule in others]
    return CopiedKeys({key for group in groups for key in group.keys}, paths, rests)


def _claim_group(
    group: KeyGroup,
    candidates: Mapping[int, _Claim],
    claims: Claims,
    used: set[int],
    twice: dict[tuple[int, int], list[str]],
    problems: list[Diagnostic],
    tied: Mapping[str, str],
    wanted: Collection[str],
    copied: CopiedKeys | None,
) -> None:
    hits: list[tuple[int, MatchedColumns]] = []
    unclear: list[int] = []
    for number, candidate in candidates.items():
        try:
            found = match_group(group, candidate.pattern)
        except RecipeError as error:
            problems += _in_rule(error, candidate.text, candidate.place)
            unclear.append(number)
            continue
        if found is not None and candidate.whole is not None:
            found = found.where([key in candidate.whole for key in found.keys])
        if found is not None and found.keys:
            hits.append((number, found))
    if unclear:
        # which rule takes these keys is not known, so nothing is said of who else may or may not
        used.update(unclear, (number for number, _ in hits))
        return
    for number, matches in [hit for hit in hits if candidates[hit[0]].shared]:
        used.add(number)
        claims.shared.update(matches.keys)
        _take(candidates[number], matches, claims, problems)
    hits = [hit for hit in hits if not candidates[hit[0]].shared]
    hits = _yielded(hits, candidates, used, tied, wanted)
    if copied is not None:
        used.update(number for number, _ in hits)
        hits = copied.settled(hits)
    whole = [(n, m) for n, m in hits if len(m.keys) == len(group.keys)]
    if len(hits) == 1 and whole:
        _take(candidates[hits[0][0]], hits[0][1], claims, problems)
        used.add(hits[0][0])
        return
    owner: dict[str, int] = {}
    for number, matches in hits:
        used.add(number)
        for key in matches.keys:
            if key in owner:
                twice.setdefault((owner[key], number), []).append(key)
            owner[key] = number
        _take(candidates[number], matches, claims, problems)
    claims.leftover += [key for key in group.keys if key not in owner] if hits else group.keys


def _yielded(
    hits: list[tuple[int, MatchedColumns]],
    candidates: Mapping[int, _Claim],
    used: set[int],
    tied: Mapping[str, str],
    wanted: Collection[str],
) -> list[tuple[int, MatchedColumns]]:
    """The hits, with a key that a rule and an optional proof both name left to one of them.

    The proof takes it where the source's headers say that both names are one tensor, and the target does not want what
    the rule makes; else it is a tensor of its own, which is the rule's.
    """
    weak = {n for n, _ in hits if candidates[n].same and candidates[n].optional}
    rules = {n: matches for n, matches in hits if candidates[n].rule is not None}
    if not weak or not rules:
        return hits
    used.update(weak, rules)
    made: dict[str, str | None] = {}
    for n, matches in rules.items():
        makes = candidates[n].makes
        for key, values in matches.rows():
            bound = makes is not None and all(capture.name in values for capture in makes.captures)
            made[key] = makes.spell_match(candidates[n].pattern, values) if makes is not None and bound else None
    proved: set[str] = set()
    for n, matches in hits:
        said = candidates[n].said
        if n not in weak or said is None:
            continue
        for key, values in matches.rows():
            one = key in tied and tied[key] == tied.get(said.value.spell_match(said.pattern, values))
            if key not in made or (one and made[key] not in wanted):
                proved.add(key)
    left = [
        (n, m.where([(key in proved) == (n in weak) for key in m.keys]) if n in {*weak, *rules} else m) for n, m in hits
    ]
    return [(n, matches) for n, matches in left if matches.keys]


def _claim_unreadable(group: KeyGroup, candidates: Mapping[int, _Claim], claims: Claims, used: set[int]) -> None:
    """Give keys of tensors that cannot be read to the drops; a rule that only these match is not unused."""
    for number, candidate in candidates.items():
        try:
            found = match_group(group, candidate.pattern)
        except RecipeError:
            used.add(number)  # ambiguous, which is reported for keys that can be read
            continue
        if found is None:
            continue
        used.add(number)
        if candidate.rule is not None:
            claims.unread_terms[candidate.rule][candidate.term].append(found)
        elif candidate.said is not None and not candidate.same:
            claims.lost.update(dict.fromkeys(found.keys, candidate.said.text))


def _drop_unreadable(rests: Sequence[Rest], keys: Sequence[str], claims: Claims) -> None:
    """Keys of tensors that cannot be read go to a rest that drops; any other rest would have to read them."""
    for rest in rests:
        mine = {k for k in keys if rest.prefix is None or _under(rest.prefix, k)}
        if rest.kind == "drop":
            claims.lost.update((k, 'rest = "drop"') for k in keys if k in mine)
        else:
            claims.unread += [k for k in keys if k in mine]
        keys = [k for k in keys if k not in mine]
    claims.unread += keys


def _in_rule(error: RecipeError, text: str, place: str | None) -> list[Diagnostic]:
    return [replace(d, place=place, notes=(text, *d.notes)) for d in error.diagnostics]


def _take(candidate: _Claim, matches: MatchedColumns, claims: Claims, problems: list[Diagnostic]) -> None:
    if candidate.rule is not None:
        claims.terms[candidate.rule][candidate.term].append(matches)
    elif candidate.said is not None and candidate.same:
        for key, values in matches.rows():
            try:
                claims.same[key] = candidate.said.value.spell_match(candidate.said.pattern, values)
            except RecipeError as error:
                problems += _in_rule(error, candidate.text, candidate.place)
    elif candidate.said is not None:
        claims.dropped.update(dict.fromkeys(matches.keys, candidate.said.text))


def _give_rest(rests: Sequence[Rest], claims: Claims, problems: list[Diagnostic]) -> None:
    """Keys that nothing names go to the innermost rest whose scope holds them; an inner "error" keeps them."""
    left, blocked = claims.leftover, []
    for rest in rests:
        mine = [k for k in left if rest.prefix is None or _under(rest.prefix, k)]
        taken = set(mine)
        if rest.kind == "error":
            blocked += mine
        elif rest.rule is None:
            claims.dropped.update(dict.fromkeys(mine, f'rest = "{rest.kind}"'))
        elif mine:
            taken = set()
            pattern = rest.rule.rule.sources[0].pattern
            for group in group_keys(mine):
                try:
                    matches = match_group(group, pattern)
                except RecipeError as error:
                    problems += _in_rule(error, rest.rule.text, rest.rule.rule.place)
                    taken.update(group.keys)
                    continue
                if matches is not None:
                    claims.rests.append((rest.rule, matches))
                    taken.update(matches.keys)
        left = [k for k in left if k not in taken]
    claims.leftover = blocked + left


def _under(prefix: KeyPattern, key: str) -> bool:
    return bool(KeyPattern.parse("{rest...}").prefixed(prefix).readings(key))


def _claimed_twice(a: _Claim, b: _Claim, keys: list[str]) -> Diagnostic:
    folded = [text for text, _ in fold(keys)]
    return Diagnostic(
        "claimed-twice",
        f"{counted(len(keys), 'source key', 'is')} claimed by two rules: {folded[0]}",
        place=b.place or a.place,
        notes=(a.text, b.text, *folded[1:6]),
        help="each source key is claimed once: give a capture its choices, or make one the fallback (rest = …); "
        "+ SOURCE reads a key that another rule claims",
    )


def _check_unused(
    stage: Stage,
    candidates: Sequence[_Claim],
    used: set[int],
    unnamed: Sequence[str],
    problems: list[Diagnostic],
) -> None:
    for number, candidate in enumerate(candidates):
        if number in used:
            continue
        optional = stage.rules[candidate.rule].rule.optional if candidate.rule is not None else candidate.optional
        if optional:
            continue
        if candidate.whole is not None and candidate.rule is not None:
            if candidate.term == 0:
                problems.append(_no_partners(stage.rules[candidate.rule]))
            continue
        what = "rule" if candidate.rule is not None else "drop" if not candidate.same else "same"
        line = candidate.text.removeprefix("drop ").removeprefix("same ")
        notes = () if candidate.text.endswith(str(candidate.pattern)) else (candidate.text,)
        problems.append(
            Diagnostic(
                f"unused-{what}",
                f"'{candidate.pattern}' matches no source key",
                place=candidate.place,
                notes=notes,
                remedies=meant_instead("rules" if what == "rule" else what, line, candidate.pattern, unnamed),
                advice=notation_advice(candidate.pattern),
            )
        )


def _no_partners(bound: ResolvedRule) -> Diagnostic:
    terms = ", ".join(f"'{term.pattern}'" for term in bound.rule.sources)
    return Diagnostic(
        "unused-rule",
        f"no source keys are partners in all of {terms}",
        place=bound.rule.place,
        notes=(bound.text,),
        remedies=(Remedy("rules", {bound.text: f"? {bound.text}"}, "may find nothing", kind="instead"),),
    )


def unexpected(keys: Sequence[str], specs: dict[str, TensorSpec]) -> list[Diagnostic]:
    """The diagnostic for keys that nothing names, folded, with the line that drops them."""
    folded = fold_groups(keys, label=lambda k: specs.get(k))
    notes = tuple(f"{f.text}  {specs[f.first]}" if f.first in specs else f.text for f in folded[:12])
    more = (f"… and {len(folded) - 12} more patterns",) if len(folded) > 12 else ()
    drops = exact_patterns(keys, specs)
    return [
        Diagnostic(
            "unexpected-keys",
            f"{counted(len(keys), 'source key', 'matches')} no rule",
            notes=notes + more,
            remedies=(
                Remedy("drop", drops, "leaves them out", kind="recipe"),
                Remedy("rest", "keep", "keeps them as they are", kind="recipe"),
            ),
        )
    ]


def near_rules(key: str, patterns: Iterable[tuple[str, KeyPattern]], most: int = 3) -> list[tuple[str, str]]:
    """Rules that nearly matched a key, nearest first, each with where they part.

    >>> near_rules("h.0.attn.w", [("a -> b", KeyPattern.parse("h.{i}.mlp.w")), ("c -> d", KeyPattern.parse("x"))])
    [('a -> b', "segment 3 is 'attn', the rule wants 'mlp'")]
    """
    found = []
    segments = re.split(r"[./]", key)
    for text, pattern in patterns:
        wanted = [s for s in re.split(r"[./]+(?![^{]*\})", str(pattern)) if s]
        ahead = sum(_fits(w, s) for w, s in zip(wanted, segments))
        behind = sum(_fits(w, s) for w, s in zip(wanted[::-1], segments[::-1]))
        score = (ahead + behind) / (len(wanted) + len(segments))
        if score >= 0.5:
            found.append((score, text, _parting(wanted, segments)))
    found.sort(key=lambda f: -f[0])
    return [(text, why) for _, text, why in found[:most]]


def _fits(wanted: str, segment: str) -> bool:
    try:
        return bool(KeyPattern.parse(wanted).readings(segment))
    except RecipeError:
        return wanted == segment


def _parting(wanted: Sequence[str], segments: Sequence[str]) -> str:
    for at, (w, s) in enumerate(zip(wanted, segments)):
        if not _fits(w, s):
            return f"segment {at + 1} is {s!r}, the rule wants {w!r}"
    return f"the key has {len(segments)} segments, the rule {len(wanted)}"
