"""Which spelling of a `[names]` table each term has, where several terms stand on one side of a rule.

`base.{m}.weight, lo.{m}.up, lo.{m}.down -> {m}.weight` joins tensors of two files. One file may spell the table's names
as its sources do and the other as its targets do, so the keys decide, term by term. A side of one term has no such
choice: a source is spelled by the table's sources, a target by its targets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ..errors import Diagnostic, RecipeError
from ..language.grouping import KeyGroup, group_keys, template
from ..language.keys import Capture, KeyPattern, Literal
from ..language.rules import Term
from .expanding import ResolvedRule, Stage
from .matching import match_group

__all__ = ["respelled"]

Table = Mapping[str, str]


def respelled(stage: Stage, source: Collection[str], target: Collection[str], problems: list[Diagnostic]) -> Stage:
    """Return the stage with every joined term in the spelling of its keys.

    A term keeps the spelling of its own side where keys match it, or where none match the other spelling. It takes the
    other spelling where all matching keys have it. The whole term has one spelling, for all of its tables.

    Args:
        source, target: the keys of each side; the target's are empty where there is no target.
        problems: receives an error for each term whose keys mix both spellings.
    """
    joined = [any(len(side) > 1 for side in (b.rule.sources, b.rule.targets)) and bool(b.tables) for b in stage.rules]
    if not any(joined):
        return stage
    groups = group_keys(source), group_keys(target)
    rules = [_bound(b, groups, problems) if many else b for b, many in zip(stage.rules, joined)]
    return replace(stage, rules=rules)


def _bound(
    bound: ResolvedRule, groups: tuple[list[KeyGroup], list[KeyGroup]], problems: list[Diagnostic]
) -> ResolvedRule:
    back = {name: {target: source for source, target in table.items()} for name, table in bound.tables.items()}
    sides = ((bound.rule.sources, groups[0], bound.tables), (bound.rule.targets, groups[1], back))
    sources, targets = (
        tuple(_term(t, near, tables, bound, problems) for t in terms) if len(terms) > 1 else terms
        for terms, near, tables in sides
    )
    return replace(bound, rule=replace(bound.rule, sources=sources, targets=targets))


def _term(
    term: Term,
    groups: Sequence[KeyGroup],
    tables: Mapping[str, Table],
    bound: ResolvedRule,
    problems: list[Diagnostic],
) -> Term:
    """The term in the spelling of its keys; `tables` lead from the spelling that it has to the other one."""
    other = _turned(term.pattern, tables)
    if other is None:
        return term
    try:
        own_keys, other_keys = _claimed(term.pattern, groups), _claimed(other, groups)
    except RecipeError:
        return term  # a key can be read in two ways, which is reported where keys are handed out
    if own_keys < other_keys:
        return replace(term, pattern=other)
    if own_keys and other_keys - own_keys and not _complete(term.pattern, own_keys):
        problems.append(_mixed(bound, term, min(own_keys - other_keys), min(other_keys - own_keys)))
    return term


def _turned(pattern: KeyPattern, tables: Mapping[str, Table]) -> KeyPattern | None:
    """The pattern in the other spelling; None where it captures no table, or the other spelling is not one to one."""
    pieces: list[Literal | Capture] = []
    for piece in pattern.pieces:
        if isinstance(piece, Capture) and piece.name in tables and piece.choices is not None and piece.terms is None:
            choices = tuple(tables[piece.name].get(choice, choice) for choice in piece.choices)
            if len(set(choices)) < len(choices):
                return None
            piece = replace(piece, choices=choices)
        pieces.append(piece)
    return KeyPattern(tuple(pieces)) if tuple(pieces) != pattern.pieces else None


def _claimed(pattern: KeyPattern, groups: Sequence[KeyGroup]) -> frozenset[str]:
    """The keys that a pattern matches.

    Raises:
        RecipeError: a key can be read in two ways.
    """
    head, tail = template(pattern.prefix).rstrip("0"), template(pattern.suffix).lstrip("0")
    near = [g for g in groups if g.template.startswith(head) and g.template.endswith(tail)]
    return frozenset(key for group in near if (found := match_group(group, pattern)) for key in found.keys)


def _complete(pattern: KeyPattern, keys: Collection[str]) -> bool:
    """Whether the keys have every choice of the pattern."""
    readings = [pattern.readings(key)[0] for key in keys]
    return all({r[c.name] for r in readings} >= set(c.choices) for c in pattern.firsts if c.choices is not None)


def _mixed(bound: ResolvedRule, term: Term, own: str, other: str) -> Diagnostic:
    names = ", ".join(f"[names.{name}]" for name in bound.tables)
    return Diagnostic(
        "mixed-names",
        f"'{own}' and '{other}' spell {names} in two ways, and one term has one spelling",
        place=bound.rule.place,
        notes=(bound.text,),
        help="write a rule for the keys of each spelling, with its choices: {m:conv_in,conv_out}",
    )
