"""Captures, ranges, rests, scopes, uses and stages, each on small tensors, forward and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from both_ways import Numbered, assert_equal, both_ways, forward, problems

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe, Scope
from ckptsurgery.planning.options import PlanOptions
from ckptsurgery.planning.planner import make_plan
from ckptsurgery.planning.steps import Parallel

RENAMES: list[tuple[str, Any, dict[str, str]]] = [
    ("choices, spelled on both sides", "{p:wq,wk}.w -> {p:q,k}.w", {"wq.w": "q.w", "wk.w": "k.w"}),
    ("choices, the other side bare", "{p:wq,wk}.w -> x.{p}", {"wq.w": "x.wq", "wk.w": "x.wk"}),
    ("an empty choice", "x{s:,_ema}.w -> y.{s:live,ema}.w", {"x.w": "y.live.w", "x_ema.w": "y.ema.w"}),
    ("choices with dots", "{s:a.b,c}.w -> {s:x,y.z}.w", {"a.b.w": "x.w", "c.w": "y.z.w"}),
    ("choices that are numbers", "l.{s:1,3}.w -> m.{s:0,1}.w", {"l.1.w": "m.0.w", "l.3.w": "m.1.w"}),
    ("text goes verbatim", "l.{i}.w -> m.{i}.w", {"l.00.w": "m.00.w", "l.x.w": "m.x.w"}),
    (
        "a range",
        ["l.{i:0..1}.w -> a.{i}", "l.{i:2..9}.w -> b.{i-2}"],
        {"l.0.w": "a.0", "l.1.w": "a.1", "l.2.w": "b.0", "l.9.w": "b.7"},
    ),
    ("a range on the other side", ["l.{i}.w -> a.{i:0..1}", "l.{i:2..3}.w -> b.{i}"], {"l.1.w": "a.1", "l.2.w": "b.2"}),
    ("a shift", "l.{i}.w -> m.{i+16}.w", {"l.0.w": "m.16.w", "l.7.w": "m.23.w"}),
    ("a shift from the other side", "l.{i+16}.w -> m.{i}.w", {"l.16.w": "m.0.w", "l.23.w": "m.7.w"}),
    ("a reflection", "l.{i}.w -> m.{3-i}.w", {"l.0.w": "m.3.w", "l.3.w": "m.0.w"}),
    ("dims in a sum", Recipe("l.{i}.w -> m.{n-1-i}.w", dims={"n": 4}), {"l.0.w": "m.3.w", "l.3.w": "m.0.w"}),
    (
        "dims in a range",
        Recipe(["l.{i:0..n-1}.w -> a.{i}", "l.{i:n..9}.w -> b.{i}"], dims={"n": 2}),
        {"l.1.w": "a.1", "l.2.w": "b.2"},
    ),
    ("one capture twice", "a.{i}.b.{i} -> c.{i}", {"a.1.b.1": "c.1", "a.2.b.2": "c.2"}),
    ("one capture twice, shifted", "c.{i} -> a.{i}.b.{i+1}", {"c.1": "a.1.b.2"}),
    ("a rest in the middle", "a.{r...}.w -> {r...}/w", {"a.x.w": "x/w", "a.y.z.w": "y.z/w"}),
    ("a rest with slashes", "{r...}/kernel -> {r...}.weight", {"mha/query/kernel": "mha/query.weight"}),
    ("escaped marks", r"a\[0\].\{x\} -> b\->c\,d\|e\?\\", {"a[0].{x}": "b->c,d|e?\\"}),
    ("spaces in keys", "block 0.{i}.bias -> b.{i}", {"block 0.0.bias": "b.0"}),
    (
        "a flat index, scalar",
        Recipe("b.{(s k)} -> s.{s}.{k}", dims={"k": 2}),
        {f"b.{n}": f"s.{n // 2}.{n % 2}" for n in range(6)},
    ),
    (
        "a flat index, ragged",
        Recipe("b.{(s k)} -> s.{s}.{k}", dims={"k": [1, 3]}),
        {"b.0": "s.0.0", "b.1": "s.1.0", "b.3": "s.1.2"},
    ),
    (
        "a flat index, three deep",
        Recipe("b.{(s k m)} -> s.{s}.{k}.{m}", dims={"k": [2, 4], "m": 2}),
        {f"b.{n}": f"s.0.{n // 2}.{n % 2}" for n in range(4)}
        | {f"b.{n + 4}": f"s.1.{n // 2}.{n % 2}" for n in range(8)},
    ),
    (
        "a flat index regrouped",
        Recipe("b.{(s k)} -> c.{(k s)}", dims={"s": 3, "k": 2}),
        {f"b.{s * 2 + k}": f"c.{k * 3 + s}" for s in range(3) for k in range(2)},
    ),
    (
        "an optional rule that matches nothing",
        ["a -> b", "? x.{i} -> y.{i}", "? {p:q,k} -> z.{p}"],
        {"a": "b", "k": "z.k"},
    ),
    (
        "a table of names over two rules",
        Recipe(["b.{m}.w -> {m}.w", "b.{m}.bias -> {m}.bias"], names={"m": {"norm1": "ln_1", "attn.proj": "out"}}),
        {"b.norm1.w": "ln_1.w", "b.attn.proj.bias": "out.bias"},
    ),
    ("keep", Recipe(["a -> b"], rest="keep"), {"a": "b", "c.d": "c.d"}),
    ("a fallback rule", Recipe(["a -> b"], rest="{k...} -> vit.{k...}"), {"a": "b", "c.d": "vit.c.d"}),
    (
        "a scope",
        Recipe(scopes=[Scope(Recipe(["{m:n1,n2}.w -> {m:ln1,ln2}.w"], rest=None), "b.{i}.", "L.{i}.")]),
        {"b.0.n1.w": "L.0.ln1.w", "b.1.n2.w": "L.1.ln2.w"},
    ),
    (
        "a scope that keeps its rest",
        Recipe(["c -> d"], scopes=[Scope(Recipe(["a -> aa"], rest="keep"), "m.{i}.", "x.{i}.")]),
        {"c": "d", "m.0.a": "x.0.aa", "m.0.b.c": "x.0.b.c"},
    ),
    ("a scope within a scope", Recipe(["a -> b"]).scoped("x.", "y.").scoped("p/", "q/"), {"p/x.a": "q/y.b"}),
    ("a union", Recipe(["a -> b"]) + Recipe(["c -> d"]), {"a": "b", "c": "d"}),
    (
        "a union of two meanings of a dim",
        Recipe(["a.{i} -> b.{i+n}"], dims={"n": 1}) + Recipe(["c.{i} -> d.{i+n}"], dims={"n": 2}),
        {"a.0": "b.1", "c.0": "d.2"},
    ),
]


@pytest.mark.parametrize(("recipe", "keys"), [c[1:] for c in RENAMES], ids=[c[0] for c in RENAMES])
def test_keys_go_where_the_rule_says_and_back(recipe: Any, keys: dict[str, str]) -> None:
    t = Numbered()
    source = {key: t(2) for key in keys}
    both_ways(recipe, source, {keys[key]: source[key] for key in keys}, back={"target": None})


MOVES: list[tuple[str, Any, dict[str, tuple[int, ...]], Any]] = [
    ("a scalar", "a [] -> b []", {"a": ()}, lambda s: {"b": s["a"]}),
    (
        "scalars stacked",
        "e.{e} [] -> b [e]",
        {"e.0": (), "e.1": ()},
        lambda s: {"b": torch.stack([s["e.0"], s["e.1"]])},
    ),
    ("no elements", "a [x y] -> b [y x]", {"a": (0, 4)}, lambda s: {"b": s["a"].T}),
    (
        "no elements, stacked",
        "e.{e} [x y] -> b [e x y]",
        {"e.0": (0, 4), "e.1": (0, 4)},
        lambda s: {"b": torch.zeros(2, 0, 4)},
    ),
    (
        "a literal one inside a group",
        Recipe("a [1 (b c)] -> a [(1 b) c]", dims={"b": 2}),
        {"a": (1, 6)},
        lambda s: {"a": s["a"].reshape(2, 3)},
    ),
    ("a literal size", "a [3 b] -> a [b 3]", {"a": (3, 4)}, lambda s: {"a": s["a"].T}),
    ("literal sizes twice", "a [3 3 b] -> a [b 3 3]", {"a": (3, 3, 2)}, lambda s: {"a": s["a"].permute(2, 0, 1)}),
    (
        "a range gathered",
        "e.{e:8..11} [d] -> b [e d]",
        {f"e.{n}": (2,) for n in range(8, 12)},
        lambda s: {"b": torch.stack([s[f"e.{n}"] for n in range(8, 12)])},
    ),
    (
        "a list gathered, in its order",
        "e.{e:5,1} [d] -> b [e d]",
        {"e.5": (2,), "e.1": (2,)},
        lambda s: {"b": torch.stack([s["e.5"], s["e.1"]])},
    ),
    (
        "a reflection gathered",
        "e.{2-e} [d] -> b [e d]",
        {f"e.{n}": (2,) for n in range(3)},
        lambda s: {"b": torch.stack([s[f"e.{2 - n}"] for n in range(3)])},
    ),
    (
        "two indices gathered",
        "e.{i}.{j} [d] -> b [j i d]",
        {f"e.{i}.{j}": (2,) for i in range(11) for j in range(2)},
        lambda s: {"b": torch.stack([torch.stack([s[f"e.{i}.{j}"] for i in range(11)]) for j in range(2)])},
    ),
    (
        "a range scattered",
        "b [e d] -> e.{e:8..11} [d]",
        {"b": (4, 2)},
        lambda s: {f"e.{n + 8}": s["b"][n] for n in range(4)},
    ),
    (
        "a shift scattered",
        "b [e d] -> e.{e+3} [d]",
        {"b": (4, 2)},
        lambda s: {f"e.{n + 3}": s["b"][n] for n in range(4)},
    ),
    (
        "a flat index gathered",
        Recipe("b.{(s k)} [d] -> s.{s} [k d]", dims={"k": 2, "s": 3}),
        {f"b.{n}": (2,) for n in range(6)},
        lambda s: {f"s.{n}": torch.stack([s[f"b.{2 * n}"], s[f"b.{2 * n + 1}"]]) for n in range(3)},
    ),
    (
        "ragged rows by stage",
        Recipe("b [(s x:s) d] -> s.{s} [x:s d]", dims={"x": [2, 4], "s": 2}),
        {"b": (6, 3)},
        lambda s: {"s.0": s["b"][:2], "s.1": s["b"][2:]},
    ),
    (
        "dots in the middle",
        "a [x ... y] -> a [y ... x]",
        {"a": (2, 3, 4, 5)},
        lambda s: {"a": s["a"].permute(3, 1, 2, 0)},
    ),
    ("dots that stand for nothing", "a [x ... y] -> a [y ... x]", {"a": (2, 5)}, lambda s: {"a": s["a"].T}),
]


@pytest.mark.parametrize(("recipe", "shapes", "wanted"), [c[1:] for c in MOVES], ids=[c[0] for c in MOVES])
def test_elements_go_where_the_rule_says_and_back(recipe: Any, shapes: dict[str, tuple[int, ...]], wanted: Any) -> None:
    t = Numbered()
    source = {key: t(*shape) for key, shape in shapes.items()}
    sizes = {"e": len(shapes)} if "scatter" not in str(recipe) else {}
    dims = {k: v for k, v in sizes.items() if isinstance(recipe, str) and "{e" in recipe.split("->")[0]}
    both_ways(
        recipe, source, {k: v.contiguous() for k, v in wanted(source).items()}, back={"dims": dims} if dims else None
    )


def test_ops_over_axes_run_and_turn_back() -> None:
    t = Numbered()
    parts = {f"e.{n}": t(2) for n in range(4)}
    forward("e.{e} [d] -> b [d] | mean_over(e)", parts, {"b": torch.stack(list(parts.values())).mean(0)})
    forward("a [x y] -> b [y] | sum_over(x)", {"a": (w := t(2, 3))}, {"b": w.sum(0)})
    both_ways(
        Recipe("a [y] -> b [x y] | repeat_over(x)", dims={"x": 2}), {"a": (v := t(3))}, {"b": torch.stack([v, v])}
    )
    both_ways(Recipe("a -> b.{x:0..2} | repeat_over(x)"), {"a": v}, {f"b.{n}": v.clone() for n in range(3)})
    norms = {f"rank{r}/norm": v.clone() for r in range(3)}
    both_ways("rank{r}/norm -> norm | same(r)", norms, {"norm": v}, back={"dims": {"r": 3}})
    with pytest.raises(cs.CheckpointError, match="r 2 differs"):
        cs.plan({**norms, "rank2/norm": v + 1}, "rank{r}/norm -> norm | same(r)").state_dict()


@pytest.mark.parametrize("sources", ["shared, a.{i}", "a.{i}, shared"])
def test_a_source_that_serves_several_steps_loses_none_of_them(sources: str) -> None:
    one = torch.ones(2)
    forward(f"{sources} -> b.{{i}} | same", {"shared": one, "a.0": one, "a.1": one}, {"b.0": one, "b.1": one})


def test_ops_stand_on_both_sides() -> None:
    t = Numbered()
    w = t(2, 3)
    forward("a [x y] | add(1) -> b [y x] | add(2)", {"a": w}, {"b": (w + 3).T.contiguous()})


def test_a_reversed_rule_needs_what_it_was_told() -> None:
    assert_equal(
        cs.plan({"b": torch.ones(2)}, Recipe(["a -> b"], drop=["c"]).inverse()).state_dict(), {"a": torch.ones(2)}
    )
    plan = cs.plan({"a": torch.ones(2), "c": torch.ones(1)}, Recipe(["a -> b"], drop=["c"]))
    with pytest.raises(cs.PlanError) as caught:
        plan.inverse(plan.state_dict())
    assert problems(caught.value) == ["lossy-drop"]


def test_rest_stays_within_its_scope() -> None:
    source = {k: torch.ones(1) for k in ("m.a", "m.b", "c")}
    for inner, outer, made in (
        ("drop", "keep", {"x.aa", "c"}),
        ("keep", "drop", {"x.aa", "x.b"}),
        (None, "keep", {"x.aa", "m.b", "c"}),
    ):
        recipe = Recipe(rest=outer, scopes=[Scope(Recipe(["a -> aa"], rest=inner), "m.", "x.")])
        assert set(cs.plan(source, recipe).specs) == made
    with pytest.raises(cs.PlanError, match=r"m\.b"):
        cs.plan(source, Recipe(rest="keep", scopes=[Scope(Recipe(["a -> aa"], rest="error"), "m.", "x.")]))


LIBRARY = {
    "rope": Recipe(
        ["{p:wq,wk}.w [(h:p d) e] -> {p:q,k}.w [(d h:p) e]"],
        dims={"h": {"wq": "config.heads", "wk": "config.kv ?? config.heads"}},
    )
}
CONFIG = {"heads": 1, "text": {"heads": 4, "kv": 2}}


def used(source: dict[str, torch.Tensor], scope: Scope) -> Any:
    specs = {k: cs.TensorSpec(v.shape, v.dtype) for k, v in source.items()}
    return make_plan(specs, Recipe(scopes=[scope]), LIBRARY.__getitem__, options=PlanOptions(CONFIG))


def test_a_used_recipe_takes_prefixes_a_config_and_sizes() -> None:
    source = {"m.wq.w": torch.ones(8, 3), "m.wk.w": torch.ones(8, 3)}
    told = Scope(Recipe(rest=None), "m.", "n.", use="rope", config="text")
    layouts = {s.sources[0]: s.program.moves for s in used(source, told).steps}
    assert set(used(source, told).specs) == {"n.q.w", "n.k.w"}
    assert layouts["m.wq.w"].pieces[0].shape == (2, 4, 3) and layouts["m.wk.w"].pieces[0].shape == (4, 2, 3)
    given = Scope(Recipe(rest=None, dims={"h": {"wq": 2, "wk": 8}}), "m.", "n.", use="rope", config="text")
    assert used(source, given).steps[0].program.moves.pieces[0].shape == (4, 2, 3)
    back = Scope(Recipe(rest=None), "n.", "m.", use="rope", config="text", inverse=True)
    assert set(used({"n.q.w": torch.ones(8, 3), "n.k.w": torch.ones(8, 3)}, back).specs) == set(source)


def test_stages_run_as_one_pass() -> None:
    t = Numbered()
    source = {"a": t(4, 3), "b": t(3)}
    split = Recipe(["a [(p m) n] -> {p:q,k} [m n]", "b -> b"])
    fuse = Recipe(["{p:q,k} [m n] -> w [(p m) n]", "b -> c"])
    plan = both_ways(split.then(fuse), source, {"w": source["a"], "c": source["b"]})
    assert {s.kind for s in plan.steps} == {"copy"} and plan.cost.bytes_read == 60
    crossed = Recipe(["{p:k,q} [m n] -> w [(p m) n]", "b -> c"])
    both_ways(split.then(crossed), source, {"w": source["a"].roll(2, 0), "c": source["b"]})
    added = Recipe(["q -> q | add(1)", "k -> k", "b -> b"])
    forward(
        split.then(added).then(fuse),
        source,
        {"w": source["a"] + torch.tensor([[1.0], [1], [0], [0]]), "c": source["b"]},
    )
    assert any(
        isinstance(i, Parallel)
        for s in cs.plan(source, split.then(added).then(fuse)).steps
        for i in s.program.instructions
    )


def test_a_later_stage_drops_what_an_earlier_one_made() -> None:
    source = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
    plan = forward(Recipe(["{k} -> x.{k}"]).then(Recipe(["x.a -> y"], drop=["x.b"])), source, {"y": source["a"]})
    assert dict(plan.dropped) == {"b": "x.b"}
    half = forward(
        Recipe(["a [(p m) n] -> {p:q,k} [m n]"], drop=["b"]).then(Recipe(["q -> y"], drop=["k"])),
        source,
        {"y": source["a"][:1]},
    )
    with pytest.raises(cs.PlanError) as caught:
        half.inverse({"y": source["a"][:1]})
    assert set(problems(caught.value)) == {"lossy-drop", "lossy-step"}


def test_a_stage_reads_each_source_once() -> None:
    t = Numbered()
    source = {f"l.{i}.qkv": t(6, 2) for i in range(3)}
    recipe = Recipe(["l.{i}.qkv [(p d) n] -> l.{i}.{p:q,k,v} [d n]"]).then(
        Recipe(["l.{i}.{p:q,k} -> m.{i}.{p}", "l.{i}.v [d n] -> m.{i}.v [n d]"])
    )
    plan = both_ways(
        recipe,
        source,
        {
            f"m.{i}.{p}": x.T.contiguous() if p == "v" else x.contiguous()
            for i in range(3)
            for p, x in zip("qkv", source[f"l.{i}.qkv"].chunk(3))
        },
    )
    assert sorted(k for s in plan.steps for k in s.sources) == sorted(source)


def test_equal_keys_of_a_stage_are_proved_on_the_source() -> None:
    w = torch.ones(2)
    recipe = Recipe(["{k} -> x.{k}"]).then(Recipe(["x.a -> y"], same={"x.b": "x.a"}))
    assert cs.plan({"a": w, "b": w.clone()}, recipe).proofs == (("b", "a"),)
    with pytest.raises(cs.PlanError):
        cs.plan({"a": w, "b": w + 1}, recipe).state_dict()
    computed = Recipe(["{k} -> x.{k} | add(1)"]).then(Recipe(["x.a -> y"], same={"x.b": "x.a"}))
    with pytest.raises(cs.PlanError) as caught:
        cs.plan({"a": w, "b": w.clone()}, computed)
    assert problems(caught.value) == ["not-the-same"]


def test_ties_are_found_whichever_is_written_first() -> None:
    w = torch.ones(2)
    for tie in ({"head": "emb", "other": "head"}, {"other": "head", "head": "emb"}):
        made = cs.plan({"e": w}, Recipe(["e -> emb"], tie=tie)).state_dict()
        assert made["head"] is made["emb"] and made["other"] is made["emb"]
    with pytest.raises(cs.RecipeError, match="nothing binds"):
        Recipe(["e -> emb"], tie={"head.{i}": "emb"})


def test_a_union_never_says_two_things() -> None:
    for table in ("init", "tie", "same"):
        with pytest.raises(cs.RecipeError) as caught:
            Recipe(["a -> b"], **{table: {"x": "y"}}) + Recipe(["c -> d"], **{table: {"x": "z"}})
        assert problems(caught.value) == ["bad-union"]
    with pytest.raises(cs.RecipeError, match="two different rests"):
        Recipe(rest="drop") + Recipe(rest="keep")
    assert (Recipe(drop=["x"]) + Recipe(drop=["x"])).drop == ("x",)


def test_flat_indices_are_counted_where_they_stand_apart() -> None:
    t = Numbered()
    keys = {"s.0.0": "b.0", "s.1.0": "b.1", "s.1.1": "b.2"}
    source = {k: t(2) for k in keys}
    plan = both_ways(
        "s.{s}.{k} -> b.{(s k)}", source, {keys[k]: v for k, v in source.items()}, back={"dims": {"k": [1, 2]}}
    )
    shapes = {k: cs.TensorSpec([2], "F32") for k in keys}
    assert_equal(cs.plan(plan.state_dict(), "b.{(s k)} -> s.{s}.{k}", target=shapes).state_dict(), source)


def test_flat_indices_count_over_all_rules() -> None:
    keys = {"stages.0.blocks.0.down": "blocks.0.down", "stages.1.blocks.0.down": "blocks.2.down"}
    keys |= {f"stages.{s}.blocks.{b}.w": f"blocks.{2 * s + b}.w" for s in range(2) for b in range(2)}
    t = Numbered()
    source = {k: t(1) for k in keys}
    rules = ["stages.{s}.blocks.{b}.down -> blocks.{(s b)}.down", "stages.{s}.blocks.{b}.w -> blocks.{(s b)}.w"]
    forward(rules, source, {keys[k]: v for k, v in source.items()})


def test_flat_indices_behind_other_names_count_apart() -> None:
    stages = {"enc": [2, 3], "dec": [1, 2]}
    keys = {
        f"{side}.{p}.{s}.{t}.w": f"{side}.{p}.{sum(sizes[:s]) + t}.w"
        for side, sizes in stages.items()
        for p in "qk"
        for s, count in enumerate(sizes)
        for t in range(count)
    }
    made = Numbered()
    source = {k: made(1) for k in keys}
    rules = [f"{side}.{{p:q,k}}.{{s}}.{{t}}.w -> {side}.{{p}}.{{(s t)}}.w" for side in stages]
    forward(rules, source, {keys[k]: v for k, v in source.items()})
