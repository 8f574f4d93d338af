"""Recipes as conversions of the transformers library, which loads and saves by them."""

from __future__ import annotations

import copy
import importlib
import pickle
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

import ckptsurgery as cs

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def tiny(name: str) -> Any:
    """A tiny random model of a type."""
    folder = str(Path(__file__).parents[2] / "scripts" / "exchange")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("tiny_models").build(name)
    finally:
        sys.path.remove(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mixtral", "vit", "hrm_text", "llava"])
def test_the_library_loads_and_saves_by_exported_conversions(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path / "a")
    wanted = type(model).from_pretrained(tmp_path / "a", dtype=torch.float32).state_dict()
    before = get_checkpoint_conversion_mapping(name)
    conversions = cs.recipes.to_transformers(cs.recipes.from_transformers(name))
    try:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
        loaded = type(model).from_pretrained(tmp_path / "a", dtype=torch.float32)
        loaded = pickle.loads(pickle.dumps(loaded))
        loaded.save_pretrained(tmp_path / "b")
    finally:
        register_checkpoint_conversion_mapping(name, before, overwrite=True)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in wanted.items())
    assert cs.diff(tmp_path / "a", tmp_path / "b").identical


def test_what_the_library_cannot_say_is_refused_rule_by_rule() -> None:
    inside = "a.{i}.b.{j}.{p:q,k} [d x] -> x.{i}.y.{j}.qk [(p d) x]"
    rules = [inside, "w [(g p d) x] -> w [(p g d) x]", "e.{s...} -> f.{s...}"]
    with pytest.raises(cs.RecipeError) as caught:
        cs.recipes.to_transformers(cs.Recipe(rules, dims={"g": 2, "p": 3}, rest="keep"))
    assert [d.code for d in caught.value.diagnostics] == ["not-exportable"] * 2
    assert "a capture inside of what changes" in str(caught.value)


def loaded(conversions: list[Any], files: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the library's own renames and converters make of files, without a model."""
    renames = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    made: dict[str, torch.Tensor] = {}
    groups: dict[str, WeightConverter] = {}
    for key in sorted(files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renames, converters)
        if pattern is None:
            assert name not in made
            made[name] = files[key]
        else:
            group = groups.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            group.add_tensor(name, key, pattern, files[key])  # type: ignore[arg-type]
    for name, group in groups.items():
        made |= {key: t[0] if isinstance(t, list) else t for key, t in group.convert(name).items()}
    return made


def same(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return made.keys() == wanted.keys() and all(torch.equal(made[key], wanted[key]) for key in wanted)


WORDS = ("model", "lm", "layers", "attn", "mlp", "q", "w", "weight", "0", "1")


def random_renames(rng: random.Random) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Rules that rename beginnings, ends, middles and whole keys, and the keys of a file."""

    def some(most: int) -> str:
        return ".".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    keys = sorted({some(4) for _ in range(rng.randint(3, 10))})
    rules = []
    for _ in range(rng.randint(1, 3)):
        parts, new = rng.choice(keys).split("."), some(2)
        cut = rng.randint(1, len(parts))
        head, tail, middle = ".".join(parts[:cut]), ".".join(parts[-cut:]), parts[len(parts) // 2]
        numbered = ".".join("{i}" if part.isdigit() and parts.count(part) == 1 else part for part in parts)
        rules.append(
            rng.choice(
                [
                    f"? {head}.{{r...}} -> {new}.{{r...}}",
                    f"? {head}.{{r...}} -> {{r...}}",
                    f"? {{r...}}.{tail} -> {{r...}}.{new}",
                    f"? {{a...}}.{middle}.{{b...}} -> {{a...}}.{new}.{{b...}}",
                    f"? {'.'.join(parts)} -> {new}",
                    f"? {numbered} -> {new}" + (".{i}" if numbered.count("{i}") == 1 else ""),
                ]
            )
        )
    return rules, {key: torch.tensor([float(n)]) for n, key in enumerate(keys)}


def test_random_renames_load_as_the_plan_has_them() -> None:
    seen: Counter[str] = Counter()
    for seed in range(600):
        rules, files = random_renames(random.Random(seed))
        try:
            recipe = cs.Recipe(rules, rest="keep")
            wanted = cs.plan(files, recipe).state_dict()
            conversions = cs.recipes.to_transformers(recipe)
        except cs.CkptSurgeryError as error:
            seen[error.diagnostics[0].code] += 1
            continue
        assert same(loaded(conversions, files), wanted), rules
        seen["same"] += 1
    assert seen["same"] > 200 and seen["not-exportable"] > 5


def saved(conversions: list[Any], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the library saves of a model that was loaded by these conversions."""
    model: Any = SimpleNamespace(_weight_conversions=[one for one in conversions if one.was_used()], config=None)
    return revert_weight_conversion(model, state)


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("{r...}.scale -> {r...}.weight", ["a.scale", "b.scale.zero", "c.scale.d.scale", "d.weight"]),
        ("{r...}.gamma -> {r...}.weight", ["ln.gamma", "blk.gamma.bias", "fc.weight", "x.ln.weight"]),
        ("{i} -> w.{i}", ["0", "x.y", "w.1"]),
        ("m.{r...}.{i}.w -> n.{r...}.{i}.v", ["m.a.0.w", "m.a.0.w.b", "xm.a.0.w", "m.m.0.w", "n.b.0.v"]),
        ("a.{i}.b.{j}.w -> x.{j}.y.{i}.z", ["a.0.b.1.w", "a.0.b.1.w.s", "x.2.y.3.z", "c.a.0.b.1.w"]),
        ("model.{s...} -> {s...}", ["model.model.x", "amodel.x", "head.model.w"]),
    ],
)
def test_a_rename_takes_whole_keys_there_and_back(rule: str, keys: list[str]) -> None:
    files = {key: torch.tensor([float(n)]) for n, key in enumerate(keys)}
    recipe = cs.Recipe([rule], rest="keep")
    wanted = cs.plan(files, recipe).state_dict()
    conversions = cs.recipes.to_transformers(recipe)
    assert same(loaded(conversions, files), wanted)
    assert same(saved(conversions, wanted), files)


REARRANGED = (
    (".w [a b]", ".w [b a]"),
    (".{p:q,k}.w [a b]", ".qk.w [(p a) b]"),
    (".{p:q,k}.w [a b]", ".qk.w [a (p b)]"),
    (".qk [(p a) b]", ".{p:q,k} [a b]"),
    (".{e}.w [a b]", ".w [e a b]"),
    (".{e}.{p:q,k}.w [a b]", ".qk [e (p a) b]"),
)
FRAMES = (("", [""]), ("{r...}.", ["m.", "m.1."]), ("h.{i}.", ["h.3.", "h.x."]), ("h.{i}.m.{j}.", ["h.3.m.1."]))


def spelled(side: str) -> list[str]:
    """The keys of one side of a rule, without its axes."""
    found = [side.split(" ")[0]]
    for mark, texts in (("{p:q,k}", "qk"), ("{e}", "01")):
        found = [key.replace(mark, text) for key in found for text in (texts if mark in key else " ")]
    return found


def random_conversions(rng: random.Random) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Rules that rearrange, and a file with their keys among others that look like them on either side."""
    rules, real, false = list[str](), set[str](), set[str]()
    for number in range(rng.randint(1, 2)):
        before, after = rng.choice(REARRANGED)
        frame, stems = rng.choice(FRAMES)
        old, new = (f"{rng.choice(names)}{number}" for names in ("sw", "twq"))
        rules.append(f"{frame}{old}{before} -> {frame}{new}{after}")
        real |= {stem + key for stem in stems for key in spelled(old + before)}
        false |= {stem.replace("3", "4").replace("m", "n") + key for stem in stems for key in spelled(new + after)}
    for key in real:
        head, _, tail = key.partition(".")
        false |= {f"{key}.scale", f"{key}_s", f"z.{key}", f"z{key}", f"{head}.z.{tail}", key[:-2], f"{key}.{key}"}
    keys = [*sorted(real), *rng.sample(sorted(false - real), min(len(false - real), rng.randint(1, 8)))]
    rng.shuffle(keys)
    return rules, {key: torch.arange(24.0).reshape(4, 6) + 24 * n for n, key in enumerate(keys)}


def test_random_conversions_take_whole_keys_there_and_back() -> None:
    seen: Counter[str] = Counter()
    for seed in range(200):
        rules, files = random_conversions(random.Random(seed))
        try:
            recipe = cs.Recipe(rules, rest="keep")
            wanted = cs.plan(files, recipe).state_dict()
            conversions = cs.recipes.to_transformers(recipe)
        except cs.CkptSurgeryError as error:
            seen[error.diagnostics[0].code] += 1
            continue
        try:
            made = loaded(conversions, files)
            back = saved(conversions, wanted)
        except ValueError as error:  # such as h.0.t.w.h.0.t.w, refused by its name
            assert "occurs twice" in str(error)
            seen["twice"] += 1
            continue
        assert same(made, wanted) and same(back, files), rules
        seen["same"] += 1
    assert seen["same"] > 100 and seen["twice"] < 20 and not seen["not-exportable"], seen


def test_renames_of_which_one_meets_the_result_of_another_are_ordered_or_refused() -> None:
    rules = ["model.{s...} -> {s...}", "layers.{s...} -> h.{s...}", "x.{s...} -> layers.{s...}"]
    files = {key: torch.ones(1) for key in ("model.layers.w", "layers.0.w", "x.b.w")}
    recipe = cs.Recipe(rules, rest="keep")
    assert loaded(cs.recipes.to_transformers(recipe), files).keys() == cs.plan(files, recipe).state_dict().keys()
    with pytest.raises(cs.RecipeError, match="renamed again"):
        cs.recipes.to_transformers(cs.Recipe(["x.{s...} -> y.{s...}", "y.{s...} -> x.{s...}"], rest="keep"))


@pytest.mark.parametrize("parts", ["o,v", "o,v,k", "o,v,k,g"])
@pytest.mark.parametrize("axes", ["[(a p)] -> [a]", "[(a p) x] -> [a x]", "[(p a) x] -> [a x]"])
def test_interleaved_parts_are_two_or_refused(parts: str, axes: str) -> None:
    before, after = axes.split(" -> ")
    recipe = cs.Recipe([f"s.w {before} -> t.{{p:{parts}}}.w {after}"], rest="keep")
    files = {"s.w": torch.arange(48.0).reshape(24, 2) if "x" in before else torch.arange(24.0)}
    if before.startswith("[(a") and parts != "o,v":
        with pytest.raises(cs.RecipeError, match="interleaved parts that are not two"):
            cs.recipes.to_transformers(recipe)
        return
    assert same(loaded(cs.recipes.to_transformers(recipe), files), cs.plan(files, recipe).state_dict())


@pytest.mark.parametrize(("given", "named"), [({"drop": ["b.w"], "rest": "keep"}, "drop"), ({"rest": "drop"}, "rest")])
def test_what_leaves_tensors_out_is_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(cs.RecipeError, match=f"not-exportable.*cannot say {named}"):
        cs.recipes.to_transformers(cs.Recipe(["a.w -> c.w"], **given))
