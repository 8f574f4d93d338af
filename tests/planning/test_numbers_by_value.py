"""Arithmetic on a captured integer uses its value, however its domain is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from both_ways import Numbered, assert_equal, both_ways, problems, refused
from hypothesis import assume, given
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe

HUGE = 40


@dataclass(frozen=True)
class Form:
    """`scale * i + offset`, as a capture and as a function."""

    scale: int
    offset: int
    by_name: bool  # whether the offset is a name of dims

    def __str__(self) -> str:
        scaled = "i" if abs(self.scale) == 1 else f"{abs(self.scale)}*i"
        offset = "n" if self.by_name else str(abs(self.offset))
        if self.scale < 0:
            return f"{{{offset}-{scaled}}}"
        if not self.offset:
            return f"{{{scaled}}}"
        return f"{{{scaled}{'+' if self.by_name or self.offset > 0 else '-'}{offset}}}"

    def __call__(self, value: int) -> int:
        return self.scale * value + self.offset


@st.composite
def forms(draw: st.DrawFn, by_name: bool = False) -> Form:
    scale = draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
    least = HUGE * 2 if scale < 0 else 0 if by_name else -2
    return Form(scale, draw(st.integers(least, least + 9)), by_name)


@dataclass(frozen=True)
class Domain:
    """The values of `i` in order, and the capture that restricts it to them."""

    values: tuple[int, ...]
    capture: str


@st.composite
def domains(draw: st.DrawFn) -> Domain:
    if draw(st.booleans()):
        first = draw(st.integers(0, 9))
        last = first + draw(st.integers(0, 4))
        return Domain(tuple(range(first, last + 1)), f"{{i:{first}..{last}}}")
    values = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5, unique=True))
    return Domain(tuple(values), "{i:" + ",".join(map(str, values)) + "}")


def keys(prefix: str, captures: Sequence[Form | str], value: int) -> str:
    return ".".join([prefix, *(str(c(value) if isinstance(c, Form) else value) for c in captures), "w"])


@given(st.data())
def test_loops(data: st.DataObject) -> None:
    """Any domain, said on either side or nowhere, beside any forms on both sides."""
    domain = data.draw(domains())
    named = data.draw(st.sampled_from([None, 0, 1]))
    sides: list[list[Form | str]] = [[data.draw(forms(by_name=named == n))] for n in (0, 1)]
    said = data.draw(st.sampled_from(["left", "right", "both", "nowhere"]))
    for side, name in zip(sides, ("left", "right")):
        if said in (name, "both"):
            side.insert(data.draw(st.integers(0, 1)), domain.capture)
    every = [c for side in sides for c in side if isinstance(c, Form)]
    assume(all(form(v) >= 0 for form in every for v in domain.values))
    pattern = [".".join([p, *map(str, side), "w"]) for p, side in zip("lx", sides)]
    numbers = Numbered()
    source = {keys("l", sides[0], v): numbers(2) for v in domain.values}
    wanted = {keys("x", sides[1], v): source[keys("l", sides[0], v)] for v in domain.values}
    dims: dict[str, Any] = {} if named is None else {"n": next(f.offset for f in every if f.by_name)}
    others = [v for v in range(HUGE // 2) if v not in domain.values and all(form(v) >= 0 for form in every)]
    if said != "nowhere":  # the restriction leaves other values to the rest
        kept = {keys("l", sides[0], v): numbers(3) for v in others}
        source, wanted = {**source, **kept}, {**wanted, **kept}
    both_ways(Recipe([f"{pattern[0]} -> {pattern[1]}"], dims=dims, rest="keep"), source, wanted)


@given(st.data())
def test_gathered_and_scattered(data: st.DataObject) -> None:
    """A list gathers in its own order and a range from its first value; keys are spelled by value both ways."""
    domain, form = data.draw(domains()), data.draw(forms())
    assume(all(form(v) >= 0 for v in domain.values))
    where = data.draw(st.sampled_from(["key", "axis"] if ".." not in domain.capture else ["key"]))
    assume(where == "key" or len(domain.values) > 1)
    key: list[Form | str] = [form, domain.capture] if where == "key" else [form]
    axis = "i" if where == "key" else domain.capture[1:-1]
    numbers = Numbered()
    source = {keys("l", key, v): numbers(3) for v in domain.values}
    wanted = {"w": torch.cat(list(source.values()))}
    both_ways(Recipe([f"{'.'.join(['l', *map(str, key), 'w'])} [d] -> w [({axis} d)]"]), source, wanted)


@given(domains(), forms(), st.permutations("abcde"))
def test_beside_names(domain: Domain, form: Form, letters: list[str]) -> None:
    """The other side may spell the same choices by names, in the rule or in a table of [names]."""
    assume(all(form(v) >= 0 for v in domain.values) and ".." not in domain.capture and str(form) != "{i}")
    spelled = letters[: len(domain.values)]
    numbers = Numbered()
    source = {f"l.{v}.w": numbers(2) for v in domain.values}
    wanted = {f"{s}.{form(v)}.w": source[f"l.{v}.w"] for s, v in zip(spelled, domain.values)}
    both_ways(Recipe([f"l.{domain.capture}.w -> {{i:{','.join(spelled)}}}.{form}.w"]), source, wanted)
    table = {"i": dict(zip(map(str, domain.values), spelled))}
    both_ways(Recipe([f"l.{{i}}.w -> {{i}}.{form}.w"], names=table), source, wanted)


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [
        ("l.{i:1,3}.w -> x.{i+10}.w", {1: 11, 3: 13}),
        ("l.{i:2,3}.w -> x.{2*i}.w", {2: 4, 3: 6}),
        ("l.{i:3}.w -> x.{i-2}.w", {3: 1}),
        ("l.{i:0,3}.w -> x.{3-i}.w", {0: 3, 3: 0}),
        ("l.{i+10}.w -> x.{i:1,3}.w", {11: 1, 13: 3}),
        ("l.{i:1,3,5}.w -> x.{i:2..9}.w", {3: 3, 5: 5}),
        ("l.{i:2..9}.w -> x.{i:1,3,5}.w", {3: 3, 5: 5}),
        ("l.{i:0..4}.w -> x.{i:3..9}.w", {3: 3, 4: 4}),
    ],
)
def test_forms(rule: str, pairs: dict[int, int]) -> None:
    numbers = Numbered()
    source = {f"l.{a}.w": numbers(2) for a in pairs}
    both_ways(rule, source, {f"x.{b}.w": source[f"l.{a}.w"] for a, b in pairs.items()})


@pytest.mark.parametrize("restriction", ["{s:1,2}", "{s:1..2}", "{s:2,1}"])
@pytest.mark.parametrize("depths", [2, [9, 2, 3]])
def test_parts_of_a_flat_index_count_by_value(restriction: str, depths: Any) -> None:
    numbers = Numbered()
    sizes = [depths] * 3 if isinstance(depths, int) else depths
    source, wanted = {}, {}
    for s in (1, 2):
        for b in range(sizes[s]):
            source[f"stages.{s}.blocks.{b}.w"] = wanted[f"blocks.{sum(sizes[:s]) + b}.w"] = numbers(2)
    both_ways(
        Recipe([f"stages.{restriction}.blocks.{{b}}.w -> blocks.{{(s b)}}.w"], dims={"b": depths}), source, wanted
    )


def test_one_side_may_spell_a_name_in_two_ways() -> None:
    numbers = Numbered()
    source = {"a.q.1.w": numbers(2), "a.k.3.w": numbers(2)}
    wanted = {"b.11.query.w": source["a.q.1.w"], "b.13.key.w": source["a.k.3.w"]}
    both_ways("a.{p:q,k}.{p:1,3}.w -> b.{p+10}.{p:query,key}.w", source, wanted)
    stacked = torch.cat(list(source.values()))
    both_ways("a.{p:q,k}.{p:1,3}.w [d] -> w [(p d)]", source, {"w": stacked})


@pytest.mark.parametrize(
    ("rule", "key", "codes"),
    [
        ("l.{i:q,k}.w -> x.{i+1}.w", "l.q.w", {"not-a-number"}),
        ("l.{i:01,03}.w -> x.{i+1}.w", "l.01.w", {"not-a-number"}),
        ("l.{i:1,3}.w -> x.{i:4..9}.w", "l.1.w", {"bad-pattern"}),
        ("l.{i}.w -> x.{i+1}.w", "l.q.w", {"not-a-number"}),
    ],
)
def test_what_has_no_value_is_refused(rule: str, key: str, codes: set[str]) -> None:
    assert set(problems(refused({key: (2,)}, rule))) == codes


def test_a_negative_number_is_reported_once_for_all_keys_of_a_rule() -> None:
    shapes: dict[str, tuple[int, ...]] = {f"l.{i}.{c}": (2,) for i in range(4) for c in "abcdefghi"}
    error = refused(shapes, "l.{i}.{c} -> x.{i-2}.{c}")
    assert problems(error) == ["negative-index"]
    assert "l.{0,1}.a" in str(error) and "l.{0,1}.f" in str(error)
    assert str(error.diagnostics[0].help).startswith("{i:2..9999} in place of {i}")
    plan = cs.plan(
        {k: cs.TensorSpec(s, "F32") for k, s in shapes.items()},
        Recipe(["l.{i:2..9999}.{c} -> x.{i-2}.{c}"], drop=["l.{i:0,1}.{c}"]),
    )
    assert len(plan.specs) == 18


def test_a_tie_that_cannot_be_computed_is_refused() -> None:
    recipe = Recipe(["a.{i}.w -> a.{i}.w"], tie={"b.{i+1}.w": "a.{i}.w"})
    plan = cs.plan({"a.4.w": cs.TensorSpec([2], "F32")}, recipe)
    assert plan.ties == {"b.5.w": "a.4.w"}
    assert problems(refused({"a.q.w": (2,)}, recipe)) == ["not-a-number"]


def test_tensors_of_all_keys_arrive() -> None:
    source = {f"l.{i}.w": torch.full((2,), float(i)) for i in (1, 3)}
    assert_equal(
        cs.plan(source, "l.{i:1,3}.w -> x.{i+10}.w").state_dict(),
        {"x.11.w": source["l.1.w"], "x.13.w": source["l.3.w"]},
    )
