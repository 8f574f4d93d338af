"""The recipe for pairs is held to one law: what it makes multiplies to what the recipe makes of the products."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
ATTENTION = {f"model.layers.{i}.self_attn.{p}_proj": (n, 16) for i in (0, 1) for p, n in zip("qkvo", (16, 8, 8, 16))}
MLP = {
    f"model.layers.{i}.mlp.{m}_proj": s
    for i in (0, 1)
    for m, s in (("gate", (24, 16)), ("up", (24, 16)), ("down", (16, 24)))
}
EXPERTS = {
    f"model.layers.0.block_sparse_moe.experts.{e}.{w}": (16, 24) if w == "w2" else (24, 16)
    for e in range(3)
    for w in ("w1", "w2", "w3")
}


def pairs(
    shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], turned: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pairs of modules, and their products as weights of that layout; ranks go by the end of a module's name."""
    generator = torch.Generator().manual_seed(0)
    made, products = {}, {}
    for module, (out, inside) in shapes.items():
        rank = next((r for end, r in ranks.items() if module.endswith(end)), 2)
        a, b = torch.randn(rank, inside, generator=generator), torch.randn(out, rank, generator=generator)
        made |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        products[f"{module}.weight"] = (b @ a).T.contiguous() if turned else b @ a
    return made, products


def check(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int] = {},
    *,
    config: object = None,
    turned: str | None = None,
) -> dict[str, Tensor]:
    """Convert pairs and products; return the pairs."""
    made, products = pairs(shapes, ranks, turned == "source")
    wanted = cs.plan(products, recipe.replace(tie={}, rest="keep"), config=config).state_dict()
    found = cs.plan(made, recipe.adapters(turned, prefix=""), config=config).state_dict()
    names = {key.partition(".lora_")[0] for key in found}
    assert names == {key.removesuffix(".weight") for key in wanted}
    for key, delta in wanted.items():
        name = key.removesuffix(".weight")
        a, b = found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"]
        if delta.dim() == 3:  # of stacked experts, as PEFT stores them
            rank = a.shape[0] // len(delta)
            ups = b.reshape(len(b), rank, len(delta))
            product = torch.stack([ups[:, :, e] @ a.reshape(len(delta), rank, -1)[e] for e in range(len(delta))])
        else:
            product = (b @ a).T if turned == "target" else b @ a
        torch.testing.assert_close(product, delta, rtol=0, atol=1e-5)
    return found


def optional(recipe: Recipe) -> Recipe:
    """The recipe, whose rules may match nothing: the products are of some modules only."""
    rules = [text if text.startswith("?") else f"? {text}" for text in map(str, recipe.rules)]
    scopes = [type(s)(optional(s.recipe), s.source, s.target, s.use, s.inverse, s.config) for s in recipe.scopes]
    return recipe.replace(rules=Recipe(rules, rest=None).rules, scopes=tuple(scopes))


def test_joined_outputs_add_up_their_ranks() -> None:
    recipe = optional(cs.load_recipe("llama/hf_to_litgpt"))
    found = check(recipe, ATTENTION | MLP, {"q_proj": 3, "k_proj": 1}, config=HEADS)
    assert found["transformer.h.0.attn.qkv.lora_A.weight"].shape == (3 + 1 + 2, 16)
    assert "attn.qkv.{l} 3 x" in recipe.adapters().summary


def test_split_outputs_share_a() -> None:
    recipe = optional(cs.load_recipe("llama/hf_to_litgpt").inverse())
    fused = {f"transformer.h.{i}.attn.qkv": (32, 16) for i in (0, 1)}
    found = check(recipe, fused, config=HEADS)
    q, k = (found[f"model.layers.0.self_attn.{p}_proj.lora_A.weight"] for p in "qk")
    assert torch.equal(q, k)
    phi = optional(cs.load_recipe("phi3/hf_to_litgpt"))
    check(phi, {"model.layers.0.mlp.gate_up_proj": (48, 16), "model.layers.0.self_attn.o_proj": (16, 16)})


def test_regrouped_rows_move_in_b_alone() -> None:
    recipe = optional(cs.load_recipe("gpt_neox/hf_to_litgpt"))
    check(recipe, {"gpt_neox.layers.0.attention.query_key_value": (48, 16)}, config={"num_attention_heads": 4})


@pytest.mark.parametrize(
    "rule",
    [
        "L.{i}.{p:q,k,v}.weight [(g rows:p) d] -> D.{i}.qkv.weight [(g p rows:p) d]",
        "L.{i}.{p:q,k,v}.weight [rows:p d] -> D.{i}.qkv.weight [(p rows:p) d]",
    ],
)
def test_interleaved_groups(rule: str) -> None:
    recipe = Recipe([rule], dims={"g": 2, "rows": {"q": 8, "k": 4, "v": 4}} if "(g" in rule else {})
    check(recipe, {f"L.{i}.{p}": (n, 16) for i in (0, 1) for p, n in zip("qkv", (16, 8, 8))}, {"q": 3})


def test_joined_inputs_and_split_inputs() -> None:
    recipe = Recipe(["{p:a,b}.weight [o i] -> w.weight [o (p i)]"])
    check(recipe, {"a": (6, 4), "b": (6, 4)}, {"a": 3})
    check(recipe.inverse(), {"w": (6, 8)})


def test_turned_weights() -> None:
    recipe = Recipe(["{b...}.{m:c_attn,c_fc}.{l} [x y?] -> {b...}.{m}.{l} [y? x]"])
    check(recipe, {"h.0.c_attn": (12, 4), "h.1.c_fc": (8, 4)}, turned="source")
    split = Recipe(["c_attn.weight [d (p k)] -> {p:q,k,v}.weight [k d]"])
    check(split, {"c_attn": (12, 4)}, turned="source")
    with pytest.raises(cs.RecipeError, match="turned names the side"):
        split.adapters()


def test_stacked_experts_and_back() -> None:
    both = check(optional(cs.load_recipe("mixtral/hf_to_hf5")), EXPERTS, {"w1": 1})
    assert both["model.layers.0.mlp.experts.gate_up_proj.lora_A.weight"].shape == (3 * (1 + 2), 16)
    plain = Recipe(["x.{e}.down.weight [d f] -> x.down [e d f]"], dims={"e": 3})
    found = check(plain, {f"x.{e}.down": (6, 4) for e in range(3)})
    assert found["x.down.lora_A.weight"].shape == (6, 4)
    back = cs.plan(found, plain.inverse().adapters(prefix="")).state_dict()
    made, _ = pairs({f"x.{e}.down": (6, 4) for e in range(3)}, {})
    assert back.keys() == made.keys() and all(torch.equal(back[k], t) for k, t in made.items())


def test_experts_that_are_stacked_as_they_are() -> None:
    rules = ["? {r...}.experts.{e}.{p:gate,up}.weight [f ...] -> {r...}.experts.both [e (p f) ...]"]
    recipe = Recipe([*rules, "{r...}.experts.{e}.down.weight [...] -> {r...}.experts.down [e ...]"])
    shapes = {
        f"l.experts.{e}.{m}": s for e in range(3) for m, s in (("gate", (8, 6)), ("up", (8, 6)), ("down", (6, 8)))
    }
    check(recipe, shapes, {"up": 3})
    stacked = check(recipe, {k: s for k, s in shapes.items() if "down" in k})
    back = cs.plan(stacked, recipe.inverse().replace(dims={"e": 3}).adapters(prefix="")).state_dict()
    assert sum("lora_A" in key for key in back) == 3


def test_what_has_no_exact_pairs_is_refused_rule_by_rule() -> None:
    recipe = Recipe(
        [
            "a.weight [o i] -> b.weight [o i] | mul(2)",
            "c.weight [o i] -> d.weight [(o i)]",
            "e.weight, f.weight -> g.weight | mean_over(m)",
            "norm.weight -> ln.weight | add(1)",
            "{k...} -> {k...}",
        ]
    )
    with pytest.raises(cs.RecipeError) as raised:
        recipe.adapters()
    assert [d.code for d in raised.value.diagnostics] == ["no-adapter-rule"] * len(raised.value.diagnostics)
    assert len(raised.value.diagnostics) == 3
