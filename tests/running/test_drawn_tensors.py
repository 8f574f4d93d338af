"""`[init]` as a source: into files and state dicts, with shapes solved, and the same numbers everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe
from ckptsurgery.language.toml import loads
from ckptsurgery.ops.initialisers import INITIALISERS, Initialiser
from ckptsurgery.ops.seeding import generator_for
from ckptsurgery.running.fingerprints import plan_digest

SOURCE = {f"layers.{i}.{n}": torch.randn(4, 6).bfloat16() for i in range(3) for n in ("attn.w", "mlp.w")}
SOURCE["head.weight"] = torch.randn(5, 6)
RECIPE = Recipe(
    ["layers.{i}.mlp.w [f d] -> layers.{i}.mlp.w [f d]"],
    drop=["head.weight"],
    rest="keep",
    init={
        "layers.{i}.router.weight [e d]": "normal(std=s)",
        "layers.{i}.{n:q,k}_norm.weight [d]": "ones",
        "layers.{i:0..1}.out.weight [d (two f)] F16": "zeros",
        "head.weight [10 d] F32": "kaiming_uniform",
    },
    dims={"e": 8, "s": 0.02, "two": 2},
)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {k: (tuple(t.shape), t.dtype) for k, t in state.items() if k not in SOURCE or k == "head.weight"}


def test_shapes_follow_from_dims_and_from_what_the_rules_solve_and_dtypes_from_the_neighbours() -> None:
    assert loads(RECIPE.dumps()) == RECIPE
    plan = cs.plan(SOURCE, RECIPE)
    made = plan.state_dict()
    half = torch.bfloat16
    assert shapes(made) == {
        **{f"layers.{i}.router.weight": ((8, 6), half) for i in range(3)},
        **{f"layers.{i}.{n}_norm.weight": ((6,), half) for i in range(3) for n in "qk"},
        **{f"layers.{i}.out.weight": ((6, 8), torch.float16) for i in range(2)},
        "head.weight": ((10, 6), torch.float32),
    }
    assert all(torch.equal(made[k], t) for k, t in SOURCE.items() if k != "head.weight")
    assert "drawn: normal(std=0.02)" in str(plan.explain("layers.1.router.weight"))


def test_a_file_a_state_dict_and_a_model_get_the_same_numbers(tmp_path: Path) -> None:
    recipe = RECIPE.replace(init={"layers.{i}.router.weight [e d]": "trunc_normal(std=0.02)"}, drop=[], rest="keep")
    plan = cs.plan(SOURCE, recipe, seed=5)
    made = plan.state_dict()
    report = plan.save(tmp_path / "x.safetensors", check=True)
    assert list(report.initialised) == [f"layers.{i}.router.weight" for i in range(3)]
    written = cs.open(tmp_path / "x.safetensors").state_dict()
    assert all(torch.equal(written[k], t) for k, t in made.items())
    assert not torch.equal(made["layers.0.router.weight"], made["layers.1.router.weight"])
    other = cs.plan(SOURCE, recipe, seed=6).state_dict()
    assert not torch.equal(made["layers.0.router.weight"], other["layers.0.router.weight"])
    fewer = {k: t for k, t in SOURCE.items() if "layers.0" not in k}  # what else is drawn makes no difference
    again = cs.plan(fewer, recipe, seed=5).state_dict()
    assert torch.equal(again["layers.2.router.weight"], made["layers.2.router.weight"])
    specs = {k: cs.TensorSpec(t.shape, t.dtype) for k, t in made.items()}
    bare = recipe.replace(init={"layers.{i}.router.weight": "trunc_normal(std=0.02)"})
    by_target = cs.plan(SOURCE, bare, target=specs, seed=5).state_dict()
    assert all(torch.equal(by_target[k], t) for k, t in made.items())


@pytest.mark.parametrize("name", sorted(set(INITIALISERS) - {"default", "own"}))
def test_every_initialiser_draws_into_a_file_what_it_draws_into_a_parameter(name: str) -> None:
    text = {"constant": "constant(0.5)", "sparse": "sparse(0.5)"}.get(name, name)
    axes = "[4 3 3]" if name == "dirac" else "[4 6]"
    made = cs.plan({"a": torch.ones(1)}, Recipe(rest="keep", init={f"w {axes} F32": text}), seed=2).state_dict()["w"]
    how = Initialiser.of(name, (0.5,) if name in ("constant", "sparse") else ())
    assert torch.equal(made, how.apply(torch.empty(made.shape), generator_for(2, "w")))


def test_a_model_of_the_same_names_is_initialised_alike() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    source = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4)}
    recipe = Recipe(["0.{l} -> 0.{l}"], init={"1.weight [2 4] F32": "normal(std=0.02)", "1.bias [2] F32": "zeros"})
    made = cs.plan(source, recipe, seed=3).state_dict()
    cs.plan(source, recipe, target=model).load_into(model, seed=3)
    assert all(torch.equal(t, made[k]) for k, t in model.state_dict().items())


def test_the_way_back_leaves_out_what_was_drawn() -> None:
    recipe = RECIPE.replace(drop=[], init={"layers.{i}.router.weight [e d]": "normal", "top [e] F32": "ones"})
    made = cs.plan(SOURCE, recipe).state_dict()
    for back in (cs.plan(SOURCE, recipe).inverse(made), cs.plan(made, recipe.inverse())):
        returned = back.state_dict()
        assert returned.keys() == SOURCE.keys()
        assert all(torch.equal(returned[k], t) for k, t in SOURCE.items())


def test_what_is_drawn_goes_on_through_later_stages_under_its_last_name() -> None:
    first = Recipe(rest="keep", init={"b [2 3] F32": "normal"})
    made = cs.plan({"a": torch.ones(2)}, first.then(Recipe(["b -> c"], rest="keep"))).state_dict()
    drawn = cs.plan({"a": torch.ones(2)}, Recipe(rest="keep", init={"c [2 3] F32": "normal"})).state_dict()
    assert torch.equal(made["c"], drawn["c"])
    turned = first.then(Recipe(["b [x y] -> c [y x]"], rest="keep"))
    one, two = (cs.plan({"a": torch.ones(2)}, turned).state_dict()["c"] for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (3, 2)


@pytest.mark.parametrize(
    ("key", "how", "code"),
    [
        ("a.{i}.w [e]", "ones", "init-without-keys"),
        ("layers.{i}.z [zz]", "ones", "unsolved-axis"),
        ("layers.{i}.z [...]", "ones", "bad-init"),
        ("layers.{i}.z [e]", "default", "init-needs-model"),
        ("top [e]", "ones", "unsolved-dtype"),
        ("layers.{i}.z [e]", "xavier_uniform", "bad-init"),
        ("layers.{i}.z [e]", "oness", "bad-init"),
        ("layers.{i}.attn.w [e]", "ones", "init-and-made"),
        ("layers.{i}.z", "ones", "init-needs-target"),
        ("layers.{i}.z [e", "ones", "bad-rule"),
        ("layers.{i}.z [e] BF17", "ones", "bad-init"),
    ],
)
def test_what_cannot_be_drawn_says_why(key: str, how: str, code: str) -> None:
    with pytest.raises(cs.CkptSurgeryError) as caught:
        cs.plan(SOURCE, Recipe(rest="keep", init={key: how}, dims={"e": 8}))
    assert code in [d.code for d in caught.value.diagnostics]


def test_an_optional_entry_may_find_nothing() -> None:
    recipe = Recipe(rest="keep", init={"? a.{i}.w [e]": "ones", "? layers.{i}.z": "ones"}, dims={"e": 8})
    assert cs.plan(SOURCE, recipe).state_dict().keys() == SOURCE.keys()


def test_an_op_that_asks_gets_the_key_and_the_seed() -> None:
    seen: list[tuple[str, int]] = []

    @cs.op
    class Witness(cs.Op):
        """Note where it runs."""

        name = "witness"

        def infer(self, specs: Any) -> Any:
            return specs

        def run(self, tensors: Any, at: Any) -> Any:
            seen.append((at.key, at.seed))
            return tensors

    def keys(rule: str, source: dict[str, Tensor]) -> list[tuple[str, int]]:
        seen.clear()
        cs.plan(source, rule, seed=4).state_dict()
        return sorted(seen)

    layers = {f"l.{i}": torch.zeros(4, 2) for i in range(2)}
    assert keys("l.{i} [a b] -> m.{i} [b a] | witness", layers) == [("m.0", 4), ("m.1", 4)]
    assert keys("l.{i} [a b] | witness -> m.{i} [b a]", layers) == [("l.0", 4), ("l.1", 4)]
    assert keys("l.{i} | witness -> m.{i} | mul(2)", layers) == [("m.0", 4), ("m.1", 4)]
    split = "w [(p o) i] -> {p:q,k} [o i] | witness"
    assert keys(split, {"w": torch.zeros(4, 2)}) == [("k", 4), ("q", 4)]


def test_the_seed_is_zero_unless_another_is_given() -> None:
    recipe = Recipe(rest="keep", init={"head [3 2]": "normal"})
    drawn = [
        cs.plan({"w": torch.ones(2)}, recipe, **seed).state_dict()["head"] for seed in ({}, {"seed": 0}, {"seed": 1})
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_ranks_compare_all_that_a_plan_does() -> None:
    """Plans that differ in one thing have different digests; those of one recipe have the same."""
    wanted = {name: cs.TensorSpec([2], "F32") for name in ("a", "b", "c")}
    source = {"a": torch.ones(2), "b": torch.ones(2)}

    def digest(rules: list[str], init: str = "zeros", target: dict[str, cs.TensorSpec] = wanted, **more: Any) -> str:
        return plan_digest(cs.plan(source, Recipe(rules, init={"c": init}, **more), target=target))

    plain = digest(["a -> a", "b -> b"])
    assert plain == digest(["a -> a", "b -> b"])
    others = [
        digest(["a -> b", "b -> a"]),
        digest(["a -> a | mul(2)", "b -> b"]),
        digest(["a -> a", "b -> b"], init="ones"),
        digest(["a -> a", "b -> b"], target={**wanted, "d": wanted["a"]}, tie={"d": "a"}),
    ]
    assert len({plain, *others}) == 5
