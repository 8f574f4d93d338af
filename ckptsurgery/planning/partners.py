"""Which keys of a rule that joins by `&` have all of their partners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import RecipeError
from ..language.grouping import KeyGroup
from ..language.rules import Term
from .expanding import ResolvedRule
from .joining import Table, canonical, joined_tables, table_of
from .matching import Matches, match_group

__all__ = ["Partners", "partners_of"]

Partners = Mapping[tuple[int, int], frozenset[str]]
"""(rule, term) -> the keys of the term that have all of their partners; of rules that join by `&` only."""


def partners_of(rules: Sequence[ResolvedRule], groups: Sequence[KeyGroup]) -> Partners:
    """Return, for each source term of a rule that joins by `&`, the keys for which every other term has a key too.

    Two keys are partners where they bind the names that both terms capture to the same values.
    """
    found: dict[tuple[int, int], frozenset[str]] = {}
    for number, bound in enumerate(rules):
        if bound.rule.joined:
            for place, keys in enumerate(_complete(bound.rule.sources, groups)):
                found[number, place] = keys
    return found


def _complete(terms: Sequence[Term], groups: Sequence[KeyGroup]) -> list[frozenset[str]]:
    tables = [table_of([canonical(term, m) for m in _matched(term, groups)]) for term in terms]
    if not all(table.rows for table in tables):
        return [frozenset()] * len(terms)
    whole: Table = joined_tables(tables, [])
    columns = list(zip(*(keys for keys, _ in whole.rows)))
    return [frozenset(column) for column in columns] or [frozenset()] * len(terms)


def _matched(term: Term, groups: Sequence[KeyGroup]) -> list[Matches]:
    found: list[Matches] = []
    for group in groups:
        try:
            matches = match_group(group, term.pattern)
        except RecipeError:
            continue  # a key that can be read in two ways, which is reported where keys are handed out
        if matches is not None:
            found.append(matches)
    return found
