"""`take(x, ids)`, lists by index, files of numbers, and formulas over the index that a key captures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from both_ways import assert_equal, both_ways, forward, problems, refused, specs_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe
from ckptsurgery.language.toml import loads

W = torch.arange(24.0).reshape(4, 6)
LAYERS = {f"l.{i}.w": W + 100 * i for i in range(3)}


@given(st.data())
def test_a_permutation_along_any_axis_wherever_it_stands_comes_back(data: st.DataObject) -> None:
    sizes = {name: data.draw(st.integers(1, 3)) for name in "abc"}
    order = data.draw(st.permutations("abc"))
    axis = data.draw(st.sampled_from("abc"))
    ids = data.draw(st.permutations(range(sizes[axis])))
    left = data.draw(st.sampled_from(["[a b c]", "[(a b) c]", "[a (b c)]"]))
    spelled = data.draw(st.sampled_from(["[{} {} {}]", "[({} {}) {}]", "[{} ({} {})]", "[({} {} {})]"]))
    side = data.draw(st.sampled_from(["before", "after"]))
    before, after = (f" | take({axis}, ids)", "") if side == "before" else ("", f" | take({axis}, ids)")
    recipe = Recipe(
        [f"t.{{i}} {left}{before} -> u.{{i}} {spelled.format(*order)}{after}"],
        dims={"ids": ids, **sizes},
    )
    whole = torch.arange(float(np.prod(list(sizes.values())))).reshape(*sizes.values())
    moved = torch.tensor(np.take(whole.numpy(), ids, axis="abc".index(axis))).permute(*("abc".index(n) for n in order))
    shape = cs.plan({"t.0": torch.zeros(_shape(left, sizes))}, recipe).specs["u.0"].shape
    source = {f"t.{i}": whole.reshape(_shape(left, sizes)) + i for i in range(2)}
    both_ways(loads(recipe.dumps()), source, {f"u.{i}": (moved.reshape(shape) + i).contiguous() for i in range(2)})


def _shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    a, b, c = sizes.values()
    return {"[a b c]": (a, b, c), "[(a b) c]": (a * b, c), "[a (b c)]": (a, b * c)}[axes]


@pytest.mark.parametrize(
    "dims",
    [
        {"keep": {"0": [0], "1": [1, 2], "2": []}},
        {"keep": [[0], [1, 2], []]},
        {"keep": [["n - 1"], [1, 2], []], "n": 1},
    ],
)
def test_each_index_has_its_own_list(dims: Any) -> None:
    recipe = loads(Recipe(["l.{i}.w [o x] -> l.{i}.w [o x] | take(x, keep:i)"], dims=dims).dumps())
    lists = ([0], [1, 2], [])
    forward(recipe, LAYERS, {f"l.{i}.w": (W + 100 * i)[:, ids].contiguous() for i, ids in enumerate(lists)})


def test_a_choice_picks_by_either_spelling_and_a_number_by_its_place() -> None:
    source = {f"{p}.w": W for p in "qk"}
    wanted = {"query.w": W[[0]], "key.w": W[[1, 2]]}
    for table in ({"q": [0], "k": [1, 2]}, {"query": [0], "key": [1, 2]}, [[0], [1, 2]]):
        recipe = Recipe(["{p:q,k}.w [o x] -> {p:query,key}.w [o x] | take(o, t:p)"], dims={"t": table})
        forward(recipe, source, wanted)


@pytest.mark.parametrize(
    ("op", "dims"),
    [
        ("mul(t)", {"t": "i / (n - 1)", "n": 3}),
        ("mul(i / 2)", {}),
        ("mul(t:i)", {"t": [0, 0.5, 1]}),
        ("mul(t:i)", {"t": {"0": 0, "1": 0.5, "2": "config.one"}}),
    ],
)
def test_an_argument_may_be_a_formula_or_a_table_of_the_index(op: str, dims: Any) -> None:
    recipe = Recipe([f"l.{{i}}.w -> l.{{i}}.w | {op}"], dims=dims)
    forward(recipe, LAYERS, {f"l.{i}.w": (W + 100 * i) * (i / 2) for i in range(3)}, config={"one": 1})


@pytest.mark.parametrize(
    ("rules", "table", "wrong"),
    [
        (["l.{i}.w -> l.{i}.w | mul(t:i)"], {"0": 1.0, "1": 2.0, "2": 3.0, "zero": 4.0}, "zero"),
        (["{p:q,k}.w -> {p:query,key}.w | mul(t:p)"], {"query": 1.0, "*": 2.0, "kye": 3.0}, "kye"),
        (["{p:q,k}.w -> {p}.w | mul(t:p)", "v.{l} -> v.{l} | mul(t:l)"], {"q": 1.0, "k": 2.0, "b": 2.0, "w": 3.0}, "b"),
    ],
)
def test_an_entry_that_nothing_picks_is_a_misspelling(rules: list[str], table: dict[str, float], wrong: str) -> None:
    source = dict.fromkeys((*LAYERS, "q.w", "k.w", "v.w"), W.shape)
    error = refused(source, Recipe(rules, dims={"t": table}, rest="keep"))
    assert problems(error) == ["unknown-choice"] and repr(wrong) in str(error)
    right = {key: value for key, value in table.items() if key != wrong}
    assert cs.plan(
        specs_of(source), Recipe(rules, dims={"t": {**right, "7": 9.0} if "0" in right else right}, rest="keep")
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.array([3, 1], "i4"))
    (tmp_path / "ids.json").write_text("[3, 1]")
    (tmp_path / "by.json").write_text(json.dumps({"0": [0], "1": [1, 2], "2": [3]}))
    (tmp_path / "ids.txt").write_text("3\n1\n")
    (tmp_path / "floats.txt").write_text("0.5 1")
    save_file({"ids": np.array([3, 1]), "table": np.ones((2, 2))}, tmp_path / "ids.safetensors")
    return tmp_path


def read(folder: Path, op: str, file: str) -> Recipe:
    text = f'rules = ["l.{{i}}.w [o x] -> l.{{i}}.w [o x] | {op}"]\n[data]\nids = "{file}"\n'
    (folder / "r.toml").write_text(text)
    return cs.load_recipe(folder / "r.toml")


@pytest.mark.parametrize("file", ["ids.npy", "ids.json", "ids.txt", "ids.safetensors#ids"])
def test_numbers_stand_in_files_beside_the_recipe(folder: Path, file: str, monkeypatch: Any) -> None:
    recipe = read(folder, "take(o, ids)", file)
    monkeypatch.chdir("/")
    plan = forward(recipe, LAYERS, {k: t[[3, 1]] for k, t in LAYERS.items()})
    assert "take(axis=o, ids=ids)" in str(plan.explain("l.0.w"))
    assert loads(recipe.dumps(), recipe.place) == recipe


def test_a_file_may_hold_a_table_by_index(folder: Path) -> None:
    recipe = read(folder, "take(o, ids:i)", "by.json")
    forward(recipe, LAYERS, {f"l.{i}.w": (W + 100 * i)[ids] for i, ids in enumerate(([0], [1, 2], [3]))})


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("../ids.npy", "not in the folder"),
        ("/ids.npy", "not in the folder"),
        ("no.npy", "no such file"),
        ("no.txt", "cannot be read"),
        ("ids.safetensors", "not a file of numbers"),
        ("ids.safetensors#no", "no"),
        ("ids.safetensors#table", "not a list of numbers"),
        ("r.toml", "not a file of numbers"),
        ("floats.txt", "ids wants"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(folder: Path, file: str, text: str) -> None:
    with pytest.raises(cs.CkptSurgeryError, match=text):
        cs.plan(LAYERS, read(folder, "take(o, ids)", file))


def test_an_entry_that_no_op_names_is_a_misspelling(folder: Path) -> None:
    with pytest.raises(cs.CkptSurgeryError) as caught:
        cs.plan(LAYERS, read(folder, "take(o, [0])", "ids.npy"))
    assert problems(caught.value) == ["unused-data"]


def test_long_lists_are_never_printed() -> None:
    ids = np.random.default_rng(0).permutation(3000)
    recipe = Recipe(["w [o x] -> w [o x] | take(o, ids)"], data={"ids": ids})
    source = {"w": torch.arange(3000.0)[:, None]}
    plan = cs.plan(source, recipe)
    assert_equal(plan.state_dict(), {"w": source["w"][torch.from_numpy(ids)]})
    assert_equal(plan.inverse(plan.state_dict()).state_dict(), source)
    for text in (str(plan), str(plan.explain("w")), repr(plan), json.dumps(plan.to_json())):
        assert len(text) < 2000
    error = refused({"w": (5, 1)}, recipe)
    assert problems(error) == ["bad-op"]
    assert len(str(error)) < 500
    with pytest.raises(cs.RecipeError, match="has no text"):
        recipe.dumps()


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("w -> w | take(x, [0])", "name the axes in the rule"),
        ("w [o x] -> w [o x] | take(y, [0])", "the axes are o, x"),
        ("w [o x] -> w [o x] | take(x, ids:i)", "no key on both sides captures 'i'"),
        ("w [o x] -> w [o x] | take(x, ids)", "dims do not name 'ids'"),
        ("l.{i}.w [o x] -> l.{i}.w [o x] | take(x, ids:i)", "neither dims nor data name 'ids'"),
        ("w [(p:q,k r:p) x] -> w [(p r:p) x] | take(r, [0])", "depends on another axis"),
    ],
)
def test_what_cannot_be_taken_says_why(rule: str, text: str) -> None:
    shapes = {"l.0.w": (4, 6)} if "{i}" in rule else {"w": (4, 6)}
    dims = {"r": {"q": 1, "k": 3}} if ":p" in rule else {}
    assert text in str(refused(shapes, Recipe([rule], dims=dims)))


def test_an_index_without_an_entry_is_named() -> None:
    recipe = Recipe(["l.{i}.w [o x] -> l.{i}.w [o x] | take(x, keep:i)"], dims={"keep": {"0": [0], "1": [0]}})
    assert "'keep' has no entry for i = 2" in str(refused({f"l.{i}.w": (2, 2) for i in range(3)}, recipe))


def test_gathered_tensors_feed_an_op_that_makes_several() -> None:
    source = {f"{p}.w": torch.randn(2, 3) for p in "qkv"}
    whole = torch.cat(list(source.values()))
    wanted = {"g": whole.norm(dim=1, keepdim=True), "v": whole}
    for rule in (
        "{p:q,k,v}.w [o i] -> g, v [(p o) i] | unfold_weight_norm",
        "{p:q,k,v}.w [o i] -> g [(p o) i], v [(p o) i] | unfold_weight_norm",
        "{p:q,k,v}.w [o i] | unfold_weight_norm -> g [(p o) i], v [(p o) i]",
    ):
        made = cs.plan(source, rule).state_dict()
        assert all(torch.allclose(made[k], t) for k, t in wanted.items())
    error = refused(dict.fromkeys(source, (2, 3)), "{p:q,k,v}.w [o i] -> g [(o p) i], v [(p o) i] | unfold_weight_norm")
    assert "one list of axes" in str(error)


@pytest.mark.parametrize("name", ["ids.json", "ids.txt"])
def test_a_file_of_numbers_that_is_too_large_is_not_read(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate((256 << 20) + 1)  # without blocks on the disk
    recipe = Recipe(["w [o x] -> w [o x] | take(o, ids)"], data={"ids": str(tmp_path / name)})
    with pytest.raises(cs.CkptSurgeryError, match="is larger than 256 MiB"):
        cs.plan({"w": W}, recipe)
