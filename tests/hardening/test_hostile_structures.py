"""Files and texts that are made by their grammar, with lies in them: a right result or an error with a remedy."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors
import torch
from hostile import safetensors_file
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from targets import refusal, walk

import ckptsurgery as cs
from ckptsurgery.language.axes import AxisList
from ckptsurgery.language.calls import parse_call
from ckptsurgery.language.dims import Dims
from ckptsurgery.language.keys import KeyPattern
from ckptsurgery.language.toml import loads
from ckptsurgery.specs import DTYPES

many = settings(max_examples=200, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("structures")
    (made / "out").mkdir()
    return made


def outcome(path: Path) -> bool:
    """Whether a file was read; refused, it must be with place and remedy."""
    try:
        walk(path)
    except cs.CkptSurgeryError as error:
        refusal(error, placed=isinstance(error, cs.CheckpointError))
        return False
    return True


# safetensors

names = st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__")
odd_numbers = st.sampled_from(
    [-1, 0, 1, 3, 2**31, 2**32, 2**53, 2**63, 2**64, 2**70, 1.0, 0.5, math.nan, True, None, "4"]
)
junk = st.recursive(
    odd_numbers | st.text(max_size=3),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A sound header and the bytes of data that it describes."""
    rows: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype = draw(st.sampled_from([d for d, kind in DTYPES.items() if kind.safetensors]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if math.prod(shape) * DTYPES[dtype].bits % 8:
            shape = [*shape, 4]
        nbytes = math.prod(shape) * DTYPES[dtype].bits // 8
        rows[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    if draw(st.booleans()):
        rows["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4) | names, max_size=3))
    return rows, position


@many
@given(layouts(), st.randoms())
def test_a_sound_safetensors_file_is_read_whatever_the_order_of_its_rows(folder, layout, chance):
    rows, nbytes = layout
    order = list(rows)
    chance.shuffle(order)
    path = safetensors_file(folder / "sound.safetensors", {name: rows[name] for name in order}, bytes(nbytes))
    assert outcome(path)


@many
@given(layouts(), st.data())
def test_a_safetensors_header_that_lies_is_refused_or_means_the_same_to_the_reference(folder, layout, data):
    rows, nbytes = layout
    for _ in range(data.draw(st.integers(1, 2))):
        if not rows:
            break
        row = rows[data.draw(st.sampled_from(sorted(rows)))]
        match data.draw(st.integers(0, 4)):
            case 0 if "shape" in row and isinstance(row["shape"], list):
                row["shape"].insert(0, data.draw(odd_numbers))
            case 1 if isinstance(row.get("data_offsets"), list) and row["data_offsets"]:
                row["data_offsets"][0] = data.draw(odd_numbers)
            case 2 if isinstance(row.get("data_offsets"), list) and row["data_offsets"]:
                row["data_offsets"][-1] = data.draw(odd_numbers)
            case 3:
                row[data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = data.draw(junk)
            case _:
                nbytes = max(0, nbytes + data.draw(st.sampled_from([-1, 1, 8])))
    path = safetensors_file(folder / "lying.safetensors", rows, bytes(nbytes))
    if outcome(path):
        with cs.open(path) as checkpoint:
            ours = {k: (s.dtype, list(s.shape)) for k, s in checkpoint.specs.items() if k not in checkpoint.aliases}
        assert ours == {k: (v["dtype"], v["shape"]) for k, v in safetensors.deserialize(path.read_bytes())}


@many
@given(junk | st.dictionaries(names, junk, max_size=3))
def test_any_json_may_stand_where_a_header_is_expected(folder, header):
    outcome(safetensors_file(folder / "junk.safetensors", header))


# indices and configurations


@many
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "metadata": junk
            | st.fixed_dictionaries({}, optional={"total_size": junk, "tied": st.just("a.w"), "b.w": junk}),
            "weight_map": junk
            | st.dictionaries(
                st.sampled_from(["a.w", "b.w", "c", "", "\ud800"]),
                st.sampled_from(
                    ["a.safetensors", "b.safetensors", "../a.safetensors", "/etc/passwd", "", ".", "out", "a\0"]
                )
                | st.text(max_size=4),
                max_size=3,
            ),
        },
    )
)
def test_any_index_stays_in_its_folder(folder, index):
    for shard in "ab":
        save_file({f"{shard}.w": torch.ones(2)}, folder / f"{shard}.safetensors")
    path = folder / "any.safetensors.index.json"
    path.write_text(json.dumps(index))
    if outcome(path):
        with cs.open(path) as checkpoint:
            assert {Path(file).parent for file in checkpoint.files} <= {folder}


@many
@given(junk, junk)
def test_any_config_gives_sizes_or_an_error(config, heads):
    dims = Dims(
        {"g": "config.heads.a ?? config.heads * 2 // config.n", "h": "g - config.n + 1"}, {"heads": heads, "n": config}
    )
    for name in ("g", "h"):
        with contextlib.suppress(cs.RecipeError):
            found = dims.get(name)
            assert found is None or isinstance(found, int | tuple)


# the language


words = st.sampled_from(["i", "p", "rest", "n", "config.a", "config.b.c", "1", "0", "12", "\u00b2", "\u0663", "9" * 25])
marks = st.sampled_from(
    [
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        ":",
        ",",
        "..",
        "...",
        "+",
        "-",
        "*",
        "//",
        "??",
        "|",
        "->",
        "?",
        "\\",
        ".",
        "/",
        " ",
        "=",
        '"',
    ]
)
texts = st.lists(words | marks | st.text(max_size=2), max_size=14).map("".join)


@many
@given(texts)
def test_any_text_is_a_rule_that_spells_itself_or_an_error(text):
    for read in (cs.Rule.parse, KeyPattern.parse, parse_call):
        with contextlib.suppress(cs.RecipeError):
            made = read(text)
            assert read(str(made)) == made
    with contextlib.suppress(cs.RecipeError):
        AxisList.parse(text)


@many
@given(texts, texts, texts)
def test_any_dims_are_solved_or_an_error(a, b, c):
    dims = Dims({"i": a, "n": b, "p": c}, {"a": 3, "b": {"c": [1, 2]}})
    for name in ("i", "n", "p"):
        with contextlib.suppress(cs.RecipeError):
            found = dims.get(name)
            assert found is None or isinstance(found, int | tuple)


LINES = """
rules = ["a.{i}.w [x y] -> b.{i}.w [y x]"] | rules = ["{k...} -> m.{k...}"] | rules = 3 | schema = 1 | schema = 9
rest = "keep" | rest = "a" | [dims] | n = "n" | a = "config.x" | n = 3 | n = [1, 2] | [names.i] | "0" = "zero"
[[scope]]
source = "a." | target = "b" | use = "llama/meta_to_hf" | use = "no/such" | inverse = true | [[then]] | [init]
"x" = "zeros" | "y" = 3 | [tie] | "z" = "b.0.w" | drop = ['a.{i}.w'] | drop = [[1]] | [[scope.scope]] | = = | [names]
"""
lines = st.sampled_from([line.strip() for line in LINES.replace("\n", "|").split("|") if line.strip()])


@settings(max_examples=150, deadline=None)
@given(st.lists(lines, max_size=8))
def test_any_recipe_is_planned_or_an_error(lines):
    source = {f"a.{i}.w": torch.ones(2, 2) for i in range(2)}
    try:
        recipe = loads("\n".join(lines), "r.toml")
    except cs.RecipeError as error:
        refusal(error, placed=False)
        return
    assert loads(recipe.dumps()) == recipe
    try:
        cs.plan(source, recipe, config={"x": 2})
    except cs.CkptSurgeryError as error:
        refusal(error, placed=False)


# pickles


arrays = st.builds(
    lambda shape, code: numpy.zeros(shape, code),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["f4", ">i8", "U3", "O", "M8[s]"]),
)
trees = st.recursive(
    arrays | st.integers() | st.text(max_size=4) | st.just(torch.ones(3)) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@example({"": numpy.zeros((), numpy.float32)}, "zip")  # without a name, and without a place of its own
@given(trees, st.sampled_from(["zip", "legacy", "pickle"]))
def test_any_tree_is_read_or_refused_in_every_torch_format(folder, tree, form):
    import pickle

    path = folder / f"tree-{form}.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(tree, 4))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=form == "zip")
    outcome(path)
