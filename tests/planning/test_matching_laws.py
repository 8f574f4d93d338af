"""Matching a pattern against templates of keys is matching it against each key."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from ckptsurgery.errors import Diagnostic, RecipeError
from ckptsurgery.language.grouping import group_keys
from ckptsurgery.language.keys import Capture, KeyPattern, Literal, Span
from ckptsurgery.language.recipe import Recipe
from ckptsurgery.planning.claims import claim
from ckptsurgery.planning.expanding import expand
from ckptsurgery.planning.matching import match_group

LITERALS = st.sampled_from([".", "/", "w", "w1", "1", "10.", ".1.", "_", ".w", "2x", "0", ".layer1."])
CHOICES = st.sampled_from([("q", "k"), ("w1", "w2", "w10"), ("", "1"), ("a.b", "1.2", "a"), ("1", "12"), ("01", "x0")])
CAPTURES = st.one_of(
    st.builds(Capture, st.sampled_from("ij")),
    st.builds(lambda n, c: Capture(n, choices=c), st.sampled_from("pq"), CHOICES),
    st.builds(
        lambda n, a, b: Capture(n, span=Span(a, a + b)), st.sampled_from("mn"), st.integers(0, 3), st.integers(0, 9)
    ),
    st.builds(lambda k: Capture("t", terms=((1, "t"), (1, k))), st.integers(0, 3)),
    st.builds(lambda k: Capture("u", terms=((1, k), (-1, "u"))), st.integers(0, 12)),
    st.builds(lambda n: Capture(n, rest=True), st.sampled_from("rs")),
    st.just(Capture("(s b)", flat=("s", "b"))),
)
PIECES = st.lists(st.one_of(LITERALS.map(Literal), CAPTURES), min_size=1, max_size=6)
KEYS = st.lists(
    st.sampled_from(["w", "1", "2", "10", "0", "01", "a", "q", ".", "/", "_", "layer", "x", "k", "."]),
    min_size=1,
    max_size=9,
)


@st.composite
def patterns(draw: st.DrawFn) -> KeyPattern:
    pieces: list[Literal | Capture] = []
    for piece in draw(PIECES):
        if pieces and isinstance(piece, Literal) and isinstance(pieces[-1], Literal):
            pieces[-1] = Literal(pieces[-1].text + piece.text)
        elif not (pieces and isinstance(piece, Capture) and isinstance(pieces[-1], Capture)):
            pieces.append(piece)
    return KeyPattern(tuple(pieces))


def parses(pattern: KeyPattern) -> bool:
    """Whether a text may say it: rests that are glued to a literal may not."""
    try:
        return bool(KeyPattern.parse(str(pattern)))
    except RecipeError:
        return False


def one_by_one(pattern: KeyPattern, keys: list[str]) -> dict[str, dict[str, str]] | None:
    """What each key binds; None where one can be read in two ways."""
    found = {}
    for key in keys:
        try:
            values = pattern.match(key)
        except RecipeError:
            return None
        if values is not None:
            found[key] = values
    return found


def by_groups(pattern: KeyPattern, keys: list[str]) -> dict[str, dict[str, str]] | None:
    found = {}
    for group in group_keys(keys):
        try:
            matches = match_group(group, pattern)
        except RecipeError:
            return None
        found.update(matches.rows() if matches is not None else ())
    return found


@st.composite
def keys_like(draw: st.DrawFn, pattern: KeyPattern) -> list[str]:
    """Keys of two kinds: spelled by the pattern from random values, and random ones."""
    keys = ["".join(k) for k in draw(st.lists(KEYS, max_size=12))]
    for _ in range(draw(st.integers(0, 8))):
        texts = []
        for piece in pattern.pieces:
            if isinstance(piece, Literal):
                texts.append(piece.text)
            elif piece.choices:
                texts.append(draw(st.sampled_from(piece.choices)))
            else:
                texts.append(draw(st.sampled_from(["0", "1", "2", "7", "10", "11", "01", "w", "w1", "a2b"])))
        keys.append("".join(texts))
    return [k for k in dict.fromkeys(keys) if k]


@given(st.data())
def test_templates_agree_with_keys(data: st.DataObject) -> None:
    pattern = data.draw(patterns())
    keys = data.draw(keys_like(pattern))
    assert by_groups(pattern, keys) == one_by_one(pattern, keys)


@given(st.data())
def test_spelling_undoes_matching(data: st.DataObject) -> None:
    pattern = data.draw(patterns())
    for key in data.draw(keys_like(pattern)):
        for values in pattern.readings(key):
            assert pattern.spell(values) == key


@given(st.data())
def test_a_claim_is_what_the_patterns_match(data: st.DataObject) -> None:
    found = [data.draw(patterns()) for _ in range(3)]
    keys = data.draw(keys_like(found[0])) + data.draw(keys_like(found[1]))
    keys = list(dict.fromkeys(keys))
    assume(all(one_by_one(p, keys) is not None and parses(p) for p in found))
    recipe = Recipe(drop=[f"? {p}" for p in found])
    problems: list[Diagnostic] = []
    claims = claim(expand(recipe, lambda name: Recipe())[0], keys, problems)
    owners = {k: [p for p in found if p.readings(k)] for k in keys}
    assert set(claims.leftover) == {k for k, who in owners.items() if not who}
    assert set(claims.dropped) == {k for k, who in owners.items() if who}
    # one pattern drawn twice is two drops
    assert any(p.code == "claimed-twice" for p in problems) == any(len(who) > 1 for who in owners.values())


@given(patterns())
def test_a_pattern_reads_its_own_text(pattern: KeyPattern) -> None:
    assume(parses(pattern))
    assert KeyPattern.parse(str(pattern)) == pattern
