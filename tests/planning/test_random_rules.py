"""Rules made up at random, held against an oracle that moves one element at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from both_ways import announced, assert_equal, of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe
from ckptsurgery.language.rules import Rule
from ckptsurgery.language.toml import loads

Values = dict[str, int]
LEFT = {"p": ("q", "k", "v"), "c": ("a.b", "w1", "")}
RIGHT = {"p": ("query", "key", "value"), "c": ("one", "2", "x.y")}


@dataclass
class Side:
    """The keys and dimensions of one side: names bound in the key, and groups of axes."""

    spelled: dict[str, tuple[str, ...]]
    key: list[str]
    groups: list[list[str]]
    offset: dict[str, int]

    def pattern(self, ragged: str | None, bare: set[str], listed: set[str]) -> str:
        parts = [self.capture(n, bare) for n in self.key]
        return "/".join(["t", *parts, "w"]) + " [" + " ".join(self.group(g, ragged, listed) for g in self.groups) + "]"

    def capture(self, name: str, bare: set[str]) -> str:
        if name in self.spelled and name not in bare:
            return f"{{{name}:{','.join(self.spelled[name])}}}"
        if self.offset.get(name):
            return f"{{{name}+{self.offset[name]}}}"
        return f"{{{name}}}"

    def group(self, axes: Sequence[str], ragged: str | None, listed: set[str]) -> str:
        shown = []
        for a in axes:
            choices = ":" + ",".join(self.spelled[a]) if a in listed and a in self.spelled else ""
            shown.append(f"{a}:p" if a == ragged else a + choices)
        return shown[0] if len(shown) == 1 else "(" + " ".join(shown) + ")"

    def name_of(self, values: Values) -> str:
        texts = [
            self.spelled[n][values[n]] if n in self.spelled else str(values[n] + self.offset.get(n, 0))
            for n in self.key
        ]
        return "/".join(["t", *texts, "w"])


@dataclass
class Case:
    """A rule with the sizes of its axes."""

    text: str
    left: Side
    right: Side
    sizes: dict[str, int]
    rows: tuple[int, ...]
    ragged: bool

    def size(self, name: str, values: Values) -> int:
        return self.rows[values["p"]] if name == "r" and self.ragged else self.sizes[name]

    def all_values(self, names: Sequence[str], start: Values) -> Iterator[Values]:
        """Every assignment, the first name slowest; `p` stands before `r` wherever both do."""
        if not names:
            yield dict(start)
            return
        for value in range(self.size(names[0], start)):
            yield from self.all_values(names[1:], {**start, names[0]: value})

    def elements(self) -> Iterator[Values]:
        names = sorted(self.sizes, key=lambda n: n == "r")
        return self.all_values(names, {})

    def place(self, side: Side, values: Values) -> tuple[str, tuple[int, ...]]:
        fixed = {n: values[n] for n in side.key}
        index = []
        for group in side.groups:
            rank = [{n: v[n] for n in group} for v in self.all_values(group, fixed)]
            index.append(rank.index({n: values[n] for n in group}))
        return side.name_of(values), tuple(index)

    def shape(self, side: Side, values: Values) -> tuple[int, ...]:
        fixed = {n: values[n] for n in side.key}
        return tuple(sum(1 for _ in self.all_values(g, fixed)) for g in side.groups)

    def states(self, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        source: dict[str, torch.Tensor] = {}
        target: dict[str, torch.Tensor] = {}
        for number, values in enumerate(self.elements()):
            for side, state in ((self.left, source), (self.right, target)):
                key, index = self.place(side, values)
                if key not in state:
                    state[key] = torch.full(self.shape(side, values), -1, dtype=dtype)
                state[key][index] = number % 251
        return source, target

    @property
    def recipe(self) -> Recipe:
        dims: dict[str, Any] = {n: s for n, s in self.sizes.items() if n not in ("r", "p", "c")}
        spellings = [
            side.spelled["p"]
            for side in (self.left, self.right)
            if "{p:" + ",".join(side.spelled["p"]) + "}" in self.text
        ]
        spelled = random.Random(self.text).choice(spellings or [self.left.spelled["p"]])
        dims["r"] = dict(zip(spelled, self.rows)) if self.ragged else self.sizes["r"]
        return Recipe(self.text, dims=dims)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    names = ["a", "b", "e", "i", "p", "c", "r"]
    kept = [n for n in names if n in ("p", "r") or draw(st.booleans())]
    sizes = {n: draw(st.integers(1, 3)) for n in kept}
    bound = {n: draw(st.sampled_from(["left", "right", "both", "none"])) if n in "eipc" else "none" for n in kept}
    bound = {n: b if n != "c" or b != "none" else "both" for n, b in bound.items()}
    if bound["p"] == "none":
        sizes["p"] = max(2, sizes["p"])  # one choice on an axis would be a marker
    ragged = draw(st.booleans())
    rows = tuple(draw(st.integers(1, 3)) for _ in range(sizes["p"]))
    spelled = [{n: table[n][: sizes[n]] for n in ("p", "c") if n in sizes} for table in (LEFT, RIGHT)]
    sides = []
    for which, table in zip(("left", "right"), spelled):
        key = draw(st.permutations([n for n in kept if bound[n] in (which, "both")]))
        axes = draw(st.permutations([n for n in kept if n not in key]))
        groups: list[list[str]] = []
        for axis in axes:
            if groups and draw(st.booleans()):
                groups[-1].append(axis)
            else:
                groups.append([axis])
        if ragged and "p" not in key:
            groups = [[a for a in g if a not in ("p", "r")] for g in groups]
            groups = [g for g in groups if g]
            groups.insert(draw(st.integers(0, len(groups))), ["p", "r"])
        offset = {n: draw(st.integers(0, 2)) for n in key if n == "i"}
        sides.append(Side(table, list(key), groups, offset))
    left, right = sides
    listed = {n for n in ("p",) if bound[n] == "none"}
    bare = {n for n in ("p",) if bound[n] == "both" and draw(st.booleans())}
    if bare:
        right.spelled = {**right.spelled, **{n: left.spelled[n] for n in bare}}
    shown = "r" if ragged else None
    text = f"{left.pattern(shown, set(), listed)} -> {right.pattern(shown, bare, set())}"
    return Case(text, left, right, sizes, rows, ragged)


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float64])


@given(cases(), DTYPES)
def test_what_is_planned_is_what_every_element_does_and_the_way_back_is_exact(case: Case, dtype: torch.dtype) -> None:
    source, target = case.states(dtype)
    plan = cs.plan(source, case.recipe)
    made = plan.state_dict()
    assert_equal(made, target)
    assert announced(plan) == of(made)
    assert_equal(plan.inverse(made).state_dict(), source)
    assert_equal(cs.plan(made, case.recipe.inverse()).state_dict(), source)


@given(cases())
def test_a_file_holds_what_the_plan_announces(tmp_path_factory: Any, case: Case) -> None:
    source, target = case.states(torch.int64)
    folder: Path = tmp_path_factory.mktemp("saved")
    plan = cs.plan(source, case.recipe)
    plan.save(folder / "x.safetensors")
    assert_equal(load_file(folder / "x.safetensors"), target)
    # and from a file, where bytes are copied without a tensor where they may be
    again = cs.plan(folder / "x.safetensors", case.recipe.inverse())
    again.save(folder / "y.safetensors")
    assert_equal(load_file(folder / "y.safetensors"), source)


@given(cases())
def test_every_target_element_is_filled_exactly_once(case: Case) -> None:
    source, _ = case.states(torch.int64)
    plan = cs.plan(source, case.recipe)
    for step in plan.steps:
        layout = step.program.moves
        assert layout is not None
        filled = [torch.zeros(shape, dtype=torch.int32).flatten() for shape in layout.targets]
        for piece in layout.pieces:
            for index in product(*map(range, piece.shape)):
                filled[piece.target][piece.target_offset + sum(i * s for i, s in zip(index, piece.target_strides))] += 1
        assert all(bool((f == 1).all()) for f in filled)
        assert layout.inverse().inverse().targets == layout.targets


@given(cases())
def test_text_and_objects_are_one(case: Case) -> None:
    rule = Rule.parse(case.text)
    assert str(rule) == case.text
    assert Rule.parse(str(rule)) == rule
    recipe = case.recipe
    assert loads(recipe.dumps()) == recipe
    assert loads(recipe.inverse().dumps()) == recipe.inverse()
    assert recipe.inverse().inverse() == recipe


@given(cases())
def test_shapes_of_the_target_do_what_dims_do(case: Case) -> None:
    source, target = case.states(torch.float32)
    specs = {k: cs.TensorSpec(t.shape, t.dtype) for k, t in target.items()}
    assert_equal(cs.plan(source, case.recipe, target=specs).state_dict(), target)


@given(cases(), st.randoms())
def test_stages_are_one_pass(case: Case, rng: random.Random) -> None:
    source, target = case.states(torch.float32)
    there_and_back = case.recipe.then(case.recipe.inverse())
    plan = cs.plan(source, there_and_back)
    assert {k for step in plan.steps for k in step.sources} == set(source)
    assert_equal(plan.state_dict(), source)
    assert_equal(plan.inverse(source).state_dict(), source)
    thrice = there_and_back.then(case.recipe)
    assert_equal(cs.plan(source, thrice).state_dict(), target)
