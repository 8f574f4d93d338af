"""Every row of the language's table, on real tensors, against einops or torch written by hand."""

from __future__ import annotations

import torch
from both_ways import Numbered, both_ways, forward
from einops import rearrange

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe


def specs(state: dict[str, torch.Tensor]) -> dict[str, cs.TensorSpec]:
    return {key: cs.TensorSpec(t.shape, t.dtype) for key, t in state.items()}


def test_a_prefix_is_stripped_and_put_back() -> None:
    t = Numbered()
    a, b = t(2, 3), t(4)
    both_ways("module.{rest...} -> {rest...}", {"module.a.w": a, "module.b": b}, {"a.w": a, "b": b})


def test_rename_and_transpose() -> None:
    t = Numbered()
    source = {f"h.{i}.mlp.c_fc.weight": t(2, 3) for i in range(12)}
    wanted = {f"layers.{i}.fc.weight": source[f"h.{i}.mlp.c_fc.weight"].T.contiguous() for i in range(12)}
    both_ways("h.{i}.mlp.c_fc.weight [x y] -> layers.{i}.fc.weight [y x]", source, wanted)


def test_the_optional_axis_lets_weight_and_bias_share_a_rule() -> None:
    t = Numbered()
    w, b = t(2, 3), t(2)
    both_ways(
        "h.{i}.mlp.c_fc.{l} [x y?] -> layers.{i}.fc.{l} [y? x]",
        {"h.0.mlp.c_fc.weight": w, "h.0.mlp.c_fc.bias": b},
        {"layers.0.fc.weight": w.T.contiguous(), "layers.0.fc.bias": b},
    )


def test_fused_attention_splits_into_equal_parts() -> None:
    t = Numbered()
    source, wanted = {}, {}
    for n in range(3):
        for l, shape in (("weight", (6, 4)), ("bias", (6,))):
            source[f"blocks.{n}.attn.qkv.{l}"] = fused = t(*shape)
            for part, piece in zip(("query", "key", "value"), fused.chunk(3)):
                wanted[f"layer.{n}.{part}.{l}"] = piece.contiguous()
    rule = "blocks.{n}.attn.qkv.{l} [(p d) ...] -> layer.{n}.{p:query,key,value}.{l} [d ...]"
    plan = both_ways(rule, source, wanted)
    assert len(plan.assumptions) > 0
    assert not forward(rule, source, wanted, target=specs(wanted)).assumptions


def test_parts_with_their_own_rows_are_concatenated_and_split_again() -> None:
    t = Numbered()
    source = {"q.weight": t(8, 4), "k.weight": t(2, 4), "v.weight": t(2, 4)}
    wanted = {"qkv.weight": torch.cat(list(source.values()))}
    rule = "{p:q,k,v}.weight [rows:p d] -> qkv.weight [(p rows:p) d]"
    both_ways(rule, source, wanted, back={"target": specs(source)})
    both_ways(rule, source, wanted, back={"dims": {"rows": {"q": 8, "k": 2, "v": 2}}})
    sized = Recipe(
        rule, dims={"rows": {"q": "config.heads * config.d", "k": "config.kv * config.d", "v": "config.kv * config.d"}}
    )
    both_ways(sized, source, wanted, config={"heads": 4, "kv": 1, "d": 2})


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: int) -> torch.Tensor:
    """Megatron's grouped interleave by hand: the queries of a group, its key, its value, group by group."""
    parts = [x.reshape(g, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def test_grouped_interleave() -> None:
    t = Numbered()
    source, wanted = {}, {}
    for i in range(2):
        q, k, v = t(8, 3), t(4, 3), t(4, 3)
        source |= {f"L.{i}.q_proj.weight": q, f"L.{i}.k_proj.weight": k, f"L.{i}.v_proj.weight": v}
        wanted[f"D.{i}.linear_qkv.weight"] = grouped(q, k, v, 2)
    rule = "L.{i}.{p:q,k,v}_proj.weight [(g rows:p) d] -> D.{i}.linear_qkv.weight [(g p rows:p) d]"
    both_ways(Recipe(rule, dims={"g": 2}), source, wanted, back={"target": specs(source)})
    both_ways(
        Recipe(rule, dims={"g": "config.kv"}),
        source,
        wanted,
        config={"kv": 2},
        back={"dims": {"rows": {"q": 4, "k": 2, "v": 2}}},
    )


def test_one_fused_tensor_is_regrouped() -> None:
    t = Numbered()
    q, k, v = t(8, 3), t(4, 3), t(4, 3)
    rule = "qkv.weight [(p:q,k,v g rows:p) d] -> qkv.weight [(g p rows:p) d]"
    dims = {"g": 2, "rows": {"q": 4, "k": 2, "v": 2}}
    both_ways(Recipe(rule, dims=dims), {"qkv.weight": torch.cat([q, k, v])}, {"qkv.weight": grouped(q, k, v, 2)})


def test_fused_heads_split_per_head() -> None:
    t = Numbered()
    fused = t(2 * 3 * 4, 5)
    wanted = {
        f"{p}.weight": x for p, x in zip("qkv", rearrange(fused, "(n p h) d -> p (n h) d", n=2, p=3).contiguous())
    }
    recipe = Recipe("query_key_value.weight [(n p h) d] -> {p:q,k,v}.weight [(n h) d]", dims={"n": "config.heads"})
    both_ways(
        recipe, {"query_key_value.weight": fused}, {k: v.contiguous() for k, v in wanted.items()}, config={"heads": 2}
    )


def test_experts_are_stacked_and_gate_and_up_joined() -> None:
    t = Numbered()
    source = {f"experts.{e}.{p}.weight": t(2, 3) for e in range(11) for p in ("w1", "w3")}
    joined = torch.stack([torch.cat([source[f"experts.{e}.{p}.weight"] for p in ("w1", "w3")]) for e in range(11)])
    both_ways(
        "experts.{e}.{p:w1,w3}.weight [f d] -> experts.gate_up_proj [e (p f) d]",
        source,
        {"experts.gate_up_proj": joined},
    )


def test_gate_and_up_are_interleaved() -> None:
    t = Numbered()
    source = {f"experts.{e}.{p}.weight": t(2, 3) for e in range(4) for p in ("gate", "up")}
    stacked = torch.stack([torch.stack([source[f"experts.{e}.{p}.weight"] for p in ("gate", "up")]) for e in range(4)])
    wanted = rearrange(stacked, "e p f d -> e (f p) d").contiguous()
    both_ways(
        "experts.{e}.{p:gate,up}.weight [f d] -> experts.gate_up [e (f p) d]", source, {"experts.gate_up": wanted}
    )


def test_rotary_rows_each_with_their_own_heads() -> None:
    t = Numbered()
    source = {"wq.weight": t(4 * 6, 3), "wk.weight": t(2 * 6, 3)}
    wanted = {
        "q_proj.weight": rearrange(source["wq.weight"], "(h half two) d -> (h two half) d", h=4, two=2).contiguous(),
        "k_proj.weight": rearrange(source["wk.weight"], "(h half two) d -> (h two half) d", h=2, two=2).contiguous(),
    }
    rule = "{p:wq,wk}.weight [(h:p half two) d] -> {p:q,k}_proj.weight [(h:p two half) d]"
    both_ways(Recipe(rule, dims={"two": 2, "h": {"wq": 4, "wk": 2}}), source, wanted)
    both_ways(Recipe(rule, dims={"two": 2, "h": {"q": 4, "k": 2}}), source, wanted)


def test_flax_attention_kernels() -> None:
    t = Numbered()
    source = {f"mha/{p}/kernel": t(4, 2, 3) for p in ("query", "key", "value")}
    wanted = torch.cat([rearrange(x, "d h k -> (h k) d") for x in source.values()])
    both_ways(
        "mha/{p:query,key,value}/kernel [d h k] -> attn.qkv.weight [(p h k) d]",
        source,
        {"attn.qkv.weight": wanted},
        back={"dims": {"h": 2}},
    )


def test_unfold_order_of_merged_patches() -> None:
    t = Numbered()
    w = t(5, 12)
    wanted = rearrange(w, "o (a b c) -> o (c b a)", a=2, b=2).contiguous()
    recipe = Recipe("reduction.weight [o (a b c)] -> reduction.weight [o (c b a)]", dims={"a": 2, "b": 2})
    both_ways(recipe, {"reduction.weight": w}, {"reduction.weight": wanted})


def test_squeeze_and_unsqueeze() -> None:
    t = Numbered()
    w = t(1, 5, 3)
    both_ways(
        "pos_embed [1 n d] -> position_embeddings.weight [n d]", {"pos_embed": w}, {"position_embeddings.weight": w[0]}
    )


def test_layers_are_shifted() -> None:
    t = Numbered()
    source = {f"layers.{i}.a.w": t(2) for i in range(8, 32)}
    wanted = {f"layers.{i + 16}.a.w": source[f"layers.{i}.a.w"] for i in range(8, 32)}
    both_ways("layers.{i:8..31}.{r...} -> layers.{i+16}.{r...}", source, wanted)


def test_layers_are_reversed() -> None:
    t = Numbered()
    source = {f"decoder.up.{i}.x": t(2) for i in range(4)}
    wanted = {f"up_blocks.{3 - i}.x": source[f"decoder.up.{i}.x"] for i in range(4)}
    both_ways("decoder.up.{i}.x -> up_blocks.{3-i}.x", source, wanted)


def test_a_flat_index_meets_nested_stages() -> None:
    t = Numbered()
    depths = [2, 1, 3]
    places = [(s, b) for s, n in enumerate(depths) for b in range(n)]
    source = {f"blocks.{n}.{l}": t(2) for n in range(6) for l in ("w", "x.b")}
    wanted = {
        f"stages.{s}.blocks.{b}.{l}": source[f"blocks.{n}.{l}"] for n, (s, b) in enumerate(places) for l in ("w", "x.b")
    }
    rule = "blocks.{(s b)}.{r...} -> stages.{s}.blocks.{b}.{r...}"
    both_ways(Recipe(rule, dims={"b": "config.depths"}), source, wanted, config={"depths": depths})
    both_ways(Recipe(rule), source, wanted, target=specs(wanted))


def test_files_of_tensor_parallel_ranks_are_merged() -> None:
    t = Numbered()
    source = {f"rank{r}/layers.{i}.wq.weight": t(2, 3) for r in range(3) for i in range(2)}
    wanted = {
        f"layers.{i}.wq.weight": torch.cat([source[f"rank{r}/layers.{i}.wq.weight"] for r in range(3)])
        for i in range(2)
    }
    both_ways(
        "rank{r}/layers.{i}.wq.weight [o d] -> layers.{i}.wq.weight [(r o) d]", source, wanted, back={"dims": {"r": 3}}
    )


def test_several_sources_go_into_one_op() -> None:
    weight = torch.tensor([[1.0, 2.0], [-4.0, 0.5]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5]])
    source = {"x.weight": weight, "x.weight_scale_inv": scale}
    plan = cs.plan(source, "x.weight, x.weight_scale_inv -> x.weight | fp8_dequant(block=128)")
    made = plan.state_dict()
    assert torch.equal(made["x.weight"].float(), weight.float() * 0.5)
    assert plan.specs["x.weight"] == cs.TensorSpec(made["x.weight"].shape, made["x.weight"].dtype)


def test_one_tensor_goes_to_two_places_and_back_by_proof() -> None:
    t = Numbered()
    w = t(3, 2)
    both_ways(
        "wte.weight -> embed.weight, lm_head.weight",
        {"wte.weight": w},
        {"embed.weight": w, "lm_head.weight": w.clone()},
    )
    both_ways(
        "embed.weight, lm_head.weight -> wte.weight | same",
        {"embed.weight": w, "lm_head.weight": w.clone()},
        {"wte.weight": w},
    )
