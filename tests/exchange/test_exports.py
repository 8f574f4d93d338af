"""Recipes in the terms of other frameworks, run there or as they run."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs

from .aoa import run_statements


def module(folder: str, name: str) -> Any:
    """A module of another folder of the repository."""
    path = str(Path(__file__).parents[2] / folder)
    sys.path.insert(0, path)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(path)


corpus = module("tests/recipes", "conversions")
UNSAID = ("the index {(", "[init]")


def functions(text: str) -> dict[str, Any]:
    """What a module of this text defines, where this library cannot be imported."""
    made: dict[str, Any] = {"__name__": "exported"}
    assert "ckptsurgery" not in text
    exec(compile(text, "exported.py", "exec"), made)
    return made


def exported(name: str) -> str | None:
    """The Python of the recipe that serves a pair of the corpus; None where it says why not."""
    try:
        return cs.recipes.to_python(corpus.recipe_for(name), config=corpus.pair(name).config)
    except cs.RecipeError as error:
        assert all(d.code == "not-exportable" and any(t in d.headline for t in UNSAID) for d in error.diagnostics)
        return None


def test_most_recipes_can_be_said_in_python() -> None:
    said = [name for name in corpus.PAIRS if exported(name) is not None]
    assert len(said) >= 46


@pytest.mark.parametrize("name", corpus.PAIRS)
def test_the_function_makes_what_the_plan_makes(name: str) -> None:
    text = exported(name)
    if text is None:
        return  # refused rule by rule, as `exported` has proved
    case = corpus.pair(name)
    source = case.numbered()
    made = functions(text)["convert"](dict(source))
    assert corpus.hashes({key: made[key] for key in case.expected}) == case.expected


@pytest.mark.filterwarnings("ignore")
def test_the_functions_run_where_this_library_is_not_installed(tmp_path: Path) -> None:
    expected = {}
    for name in ("hf_llama__litgpt", "torch_TransformerEncoder__paddle", "hf4_mixtral__hf5", "tv_convnext__timm"):
        text, case = exported(name), corpus.pair(name)
        assert text is not None
        (tmp_path / f"{name}.py").write_text(text)
        torch.save(case.numbered(), tmp_path / f"{name}.pt")
        expected[name] = case.expected
    program = (
        "import importlib, pathlib, sys, torch\n"
        "sys.modules['ckptsurgery'] = None\n"
        "sys.path.insert(0, '.')\n"
        "for file in sorted(pathlib.Path('.').glob('*.py')):\n"
        "    state = torch.load(file.with_suffix('.pt'))\n"
        "    torch.save(importlib.import_module(file.stem).convert(state), file.with_suffix('.made'))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, hashes in expected.items():
        made = torch.load(tmp_path / f"{name}.made")
        assert corpus.hashes({key: made[key] for key in hashes}) == hashes


def test_what_one_tensor_gives_to_several_comes_back_if_all_are_equal() -> None:
    recipe = cs.Recipe(["wte.weight -> embed.weight, head.weight"])
    forth, back = (functions(cs.recipes.to_python(r))["convert"] for r in (recipe, recipe.inverse()))
    made = forth({"wte.weight": torch.ones(2)})
    assert made.keys() == {"embed.weight", "head.weight"} and back(made).keys() == {"wte.weight"}
    with pytest.raises(ValueError, match="differs"):
        back({**made, "head.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        ("h.{i:2..3}.w -> h.{i-2}.w", "h.{}.w"),
        ("up.{i:0..3}.w -> up.{3-i}.w", "up.{}.w"),
        ("f.{2*s+1}.w -> s.{s}.w", "f.{}.w"),
        ("s.{s}.w -> f.{2*s+1}.w", "s.{}.w"),
    ],
)
def test_computed_indices_take_the_keys_that_the_plan_takes(rule: str, key: str) -> None:
    recipe = cs.Recipe([rule], rest="drop")
    state = {key.format(text): torch.full((2,), float(n)) for n, text in enumerate(("0", "1", "2", "3", "5"))}
    if ":" in rule:
        state[key.format("x")] = state[key.format("01")] = torch.zeros(2)
    state = {k: v for k, v in state.items() if "3-i" not in rule or "5" not in k}
    made = functions(cs.recipes.to_python(recipe))["convert"](dict(state))
    wanted = cs.plan(state, recipe).state_dict()
    assert made.keys() == wanted.keys() and all(torch.equal(made[k], v) for k, v in wanted.items())


def test_an_adapter_goes_both_ways() -> None:
    recipe = cs.Recipe(
        ["model.layers.{i}.{p:gate,up}.weight [f d] -> layers.{i}.gate_up [(p f) d]", "embed.weight -> tok.weight"]
    )
    adapter = functions(cs.recipes.to_state_dict_adapter(recipe, "Adapter"))["Adapter"](None, None)
    files = {f"model.layers.{i}.{p}.weight": torch.randn(4, 3) for i in range(2) for p in ("gate", "up")}
    files["embed.weight"] = torch.randn(5, 3)
    native = adapter.from_hf(files)
    assert set(native) == {"layers.0.gate_up", "layers.1.gate_up", "tok.weight"}
    back = adapter.to_hf(native)
    assert back.keys() == files.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in files.items())
    single = dict(
        adapter.convert_single_tensor_to_hf("layers.1.gate_up", native["layers.1.gate_up"], quantization=False)
    )
    assert single.keys() == {f"model.layers.1.{p}.weight" for p in ("gate", "up")}


def test_a_function_asks_for_the_sizes_that_nothing_settles() -> None:
    recipe = cs.Recipe(["w [(h a two) x] -> w [(h two a) x]"], dims={"two": 2, "h": "config.heads"})
    made = functions(cs.recipes.to_python(recipe))["convert"]
    w = torch.randn(16, 3)
    assert torch.equal(made({"w": w}, h=2)["w"], cs.plan({"w": w}, recipe, config={"heads": 2}).state_dict()["w"])
    with pytest.raises(TypeError, match="h"):
        made({"w": w})
    with pytest.raises(cs.RecipeError, match="the size h"):
        cs.recipes.to_state_dict_adapter(recipe)


def test_a_function_refuses_what_nothing_names() -> None:
    made = functions(cs.recipes.to_python(cs.Recipe(["a -> b"])))["convert"]
    with pytest.raises(KeyError, match="no rule names"):
        made({"a": torch.ones(1), "c": torch.ones(1)})


@dataclass
class Mapper:
    """vLLM's mapper, as its class documents it: parts first, then beginnings, then ends; None leaves a name out."""

    orig_to_new_substr: dict[str, str | None] = field(default_factory=dict)
    orig_to_new_prefix: dict[str, str | None] = field(default_factory=dict)
    orig_to_new_suffix: dict[str, str | None] = field(default_factory=dict)

    def name(self, key: str) -> str | None:
        for old, new in self.orig_to_new_substr.items():
            if old in key:
                if new is None:
                    return None
                key = key.replace(old, new, 1)
        for old, new in self.orig_to_new_prefix.items():
            if key.startswith(old):
                if new is None:
                    return None
                key = new + key[len(old) :]
        for old, new in self.orig_to_new_suffix.items():
            if key.endswith(old):
                if new is None:
                    return None
                key = key[: -len(old)] + new
        return key


def test_renames_as_a_mapper_of_names() -> None:
    recipe = cs.Recipe(
        [
            "language_model.lm_head.{s...} -> lm_head.{s...}",
            "language_model.model.{s...} -> model.language_model.{s...}",
            "{r...}.LayerNorm.{s...} -> {r...}.norm.{s...}",
            "{r...}.scale -> {r...}.weight",
        ],
        drop=["rotary.{s...}"],
        rest="keep",
    )
    keys = ["language_model.lm_head.weight", "language_model.model.layers.0.w", "enc.LayerNorm.bias", "enc.x.scale",
            "rotary.inv_freq", "other.w"]  # fmt: skip
    mapper = Mapper(**cs.recipes.to_vllm(recipe))
    plan = cs.plan({key: torch.ones(1) for key in keys}, recipe)
    made = {step.sources[0]: step.targets[0] for step in plan.steps}
    assert {key: mapper.name(key) for key in keys} == {key: made.get(key) for key in keys}


def test_the_mapper_is_given_renames_in_an_order_in_which_none_meets_the_result_of_another() -> None:
    recipe = cs.Recipe(
        ["model.{s...} -> {s...}", "layers.{s...} -> h.{s...}", "x.{s...} -> layers.{s...}"], rest="keep"
    )
    mapper = Mapper(**cs.recipes.to_vllm(recipe))
    keys = ["model.layers.w", "layers.0.w", "x.b.w"]
    plan = cs.plan({key: torch.ones(1) for key in keys}, recipe)
    assert {k: mapper.name(k) for k in keys} == {step.sources[0]: step.targets[0] for step in plan.steps}


@pytest.mark.parametrize(
    "rules",
    [
        ["w [x y] -> w [y x]"],
        ["a.{i}.w -> b.{i}.w"],
        ["x.{s...} -> y.{s...}", "y.{s...} -> x.{s...}"],
        ["{r...}.a.{s...} -> {r...}.b.c.{s...}", "{r...}.c.w -> {r...}.d"],
        ["+ x.{s...} -> y.{s...}", "x.{s...} -> z.{s...}"],
    ],
    ids=["a transpose", "a number inside", "a circle", "a chain of kinds", "shared keys"],
)
def test_what_a_mapper_of_names_cannot_say_is_refused(rules: list[str]) -> None:
    with pytest.raises(cs.RecipeError, match="WeightsMapper"):
        cs.recipes.to_vllm(cs.Recipe(rules, rest="keep"))


PADDLE = [
    "model.layers.{i}.attn.{p:q,k,v}.weight [d x] -> model.layers.{i}.attn.qkv.weight [(p d) x]",
    "model.layers.{i}.experts.{e}.up.weight [o x] -> model.layers.{i}.experts.{e}.up.weight [x o]",
    "model.layers.{i}.mlp.gate_up.weight [o (p f)] -> model.layers.{i}.mlp.{p:gate,up}.weight [o f]",
    "experts.{e}.down.weight [o f] -> down.weight [o (e f)]",
    "conv.weight [o c k] -> conv.weight [k o c]",
]


def test_statements_for_paddle() -> None:
    recipe = cs.Recipe(PADDLE, drop=["rope.inv_freq"], rest="keep")
    assert cs.recipes.to_paddle(recipe)["aoa_statements"] == [
        "model.layers.$LAYER_ID.attn.q.weight, model.layers.$LAYER_ID.attn.k.weight, "
        "model.layers.$LAYER_ID.attn.v.weight -> model.layers.$LAYER_ID.attn.qkv.weight, axis=0",
        "model.layers.$LAYER_ID.experts.$EXPERT_ID.up.weight^T -> model.layers.$LAYER_ID.experts.$EXPERT_ID.up.weight",
        "model.layers.$LAYER_ID.mlp.gate_up.weight -> model.layers.$LAYER_ID.mlp.gate.weight, "
        "model.layers.$LAYER_ID.mlp.up.weight, axis=1",
        "experts.*.down.weight -> down.weight, axis=1",
        'conv.weight -> conv.weight, permute = "[2, 0, 1]"',
        "rope.inv_freq -> _",
    ]


def test_the_statements_do_what_the_plan_does() -> None:
    recipe = cs.Recipe(PADDLE, drop=["rope.inv_freq"], rest="keep")
    state = {"conv.weight": torch.randn(2, 3, 4), "norm.weight": torch.randn(3), "rope.inv_freq": torch.randn(2)}
    state |= {f"experts.{e}.down.weight": torch.randn(4, 3) for e in range(11)}
    for i in range(2):
        at = f"model.layers.{i}."
        state |= {f"{at}attn.{p}.weight": torch.randn(2, 3) for p in "qkv"}
        state |= {f"{at}experts.{e}.up.weight": torch.randn(4, 3) for e in range(3)}
        state |= {f"{at}mlp.gate_up.weight": torch.randn(3, 8)}
    made = run_statements(cs.recipes.to_paddle(recipe)["aoa_statements"], state)
    wanted = cs.plan(state, recipe).state_dict()
    assert made.keys() == wanted.keys() and all(torch.equal(made[k], v) for k, v in wanted.items())


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("qkv [(p n:p) x] -> {p:q,k}.w [n:p x]", "unequal parts"),
        ("e.{e}.w [o i] -> w [e o i]", "not joined or cut"),
        ("w [(h a two) x] -> w [(h two a) x]", "not a permutation"),
        ("block 0.w -> block.0.w", "not a name"),
        ("a.{i}.{j}.{k}.w -> b.{i}.{j}.{k}.w", "more than two numbers"),
        ("a.{r...} -> b.{r...}", "the capture {r...}"),
        ("l.{i}.e.{e}.w [o f] -> l.{i}.w [(e o) f]", "beside another number"),
    ],
)
def test_what_a_statement_cannot_say_is_refused(rule: str, reason: str) -> None:
    with pytest.raises(cs.RecipeError, match="not-exportable") as caught:
        cs.recipes.to_paddle(cs.Recipe([rule], rest="keep", dims={"two": 2, "h": 2}))
    assert reason in str(caught.value)
