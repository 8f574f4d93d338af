"""Parts that one side holds as one: in the order that names list, with heads apart, over layers, over heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from blocks import spec

import ckptsurgery as cs

D, I, H, V = 16, 40, 4, 21
Tensors = dict[str, torch.Tensor]
LAYERS = range(3)


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    found, at = {}, 0
    for key, shape in shapes.items():
        count = torch.Size(shape).numel()
        found[key] = torch.arange(at, at + count, dtype=torch.float64).reshape(shape)
        at += count
    return found


def torch_layer(i: int) -> dict[str, tuple[int, ...]]:
    return {f"layers.{i}.attn.{m}_proj.weight": (D, D) for m in "qkvo"} | {
        f"layers.{i}.norm.weight": (D,),
        f"layers.{i}.mlp.gate_proj.weight": (I, D),
        f"layers.{i}.mlp.up_proj.weight": (I, D),
        f"layers.{i}.mlp.down_proj.weight": (D, I),
    }


TORCH = {"embed.weight": (V, D)} | {k: s for i in LAYERS for k, s in torch_layer(i).items()}


def heads(weight: torch.Tensor) -> torch.Tensor:
    return weight.T.reshape(D, H, D // H)


def einsum(given: Tensors) -> Tensors:
    """Kernels with their heads apart, gate and up in one array of two."""
    made = {"embedder/input_embedding": given["embed.weight"]}
    for i in LAYERS:
        ours, theirs = f"layers.{i}.", f"layer_{i}/"
        for m, word in zip("qkv", ("query", "key", "value")):
            made[f"{theirs}attn/{word}/kernel"] = heads(given[f"{ours}attn.{m}_proj.weight"])
        made[f"{theirs}attn/out/kernel"] = given[f"{ours}attn.o_proj.weight"].T.reshape(H, D // H, D)
        both = [given[f"{ours}mlp.{m}_proj.weight"].T for m in ("gate", "up")]
        made[f"{theirs}mlp/gating_einsum"] = torch.stack(both)
        made[f"{theirs}mlp/linear"] = given[f"{ours}mlp.down_proj.weight"].T
        made[f"{theirs}norm/scale"] = given[f"{ours}norm.weight"]
    return made


def scanned(given: Tensors) -> Tensors:
    """All layers of a kind in one array."""
    made = {"params/embed/embedding": given["embed.weight"]}

    def stacked(name: str, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.stack([turn(given[f"layers.{i}.{name}.weight"]) for i in LAYERS])

    at = "params/decoder/layers/"
    for m, word in zip("qkv", ("query", "key", "value")):
        made[f"{at}attn/{word}/kernel"] = stacked(f"attn.{m}_proj", heads)
    made[f"{at}attn/out/kernel"] = stacked("attn.o_proj", lambda w: w.T.reshape(H, D // H, D))
    for m in ("gate", "up", "down"):
        made[f"{at}mlp/{m}/kernel"] = stacked(f"mlp.{m}_proj", lambda w: w.T)
    made[f"{at}norm/scale"] = stacked("norm", lambda w: w)
    return made


def flax_fused(given: Tensors) -> Tensors:
    """Queries, keys and values in one matrix, up before gate in another."""
    made = {"wte.weight": given["embed.weight"]}
    for i in LAYERS:
        ours, theirs = f"layers.{i}.", f"h.{i}."
        made[f"{theirs}attn.qkv.weight"] = torch.cat([given[f"{ours}attn.{m}_proj.weight"] for m in "qkv"])
        made[f"{theirs}attn.out.weight"] = given[f"{ours}attn.o_proj.weight"]
        made[f"{theirs}mlp.up_gate_proj.weight"] = torch.cat(
            [given[f"{ours}mlp.{m}_proj.weight"] for m in ("up", "gate")]
        )
        made[f"{theirs}mlp.down_proj.weight"] = given[f"{ours}mlp.down_proj.weight"]
        made[f"{theirs}norm.weight"] = given[f"{ours}norm.weight"]
    return made


def each_head(given: Tensors) -> Tensors:
    """A matrix for each head."""
    made = {"wte.weight": given["embed.weight"]}
    for i in LAYERS:
        ours, theirs = f"layers.{i}.", f"h.{i}."
        for m, word in zip("qkv", ("query", "key", "value")):
            for j, part in enumerate(given[f"{ours}attn.{m}_proj.weight"].chunk(H)):
                made[f"{theirs}sa.heads.{j}.{word}.weight"] = part.contiguous()
        made[f"{theirs}sa.proj.weight"] = given[f"{ours}attn.o_proj.weight"]
        for m in ("gate", "up", "down"):
            made[f"{theirs}ffn.{m}.weight"] = given[f"{ours}mlp.{m}_proj.weight"]
        made[f"{theirs}norm.weight"] = given[f"{ours}norm.weight"]
    return made


def same(source: Tensors, target: Tensors) -> None:
    """The recipe inferred from names and shapes makes every tensor of the target, element by element."""
    found = cs.suggest(*({k: cs.TensorSpec(tuple(t.shape), "F64") for k, t in s.items()} for s in (source, target)))
    made = cs.plan(source, found.recipe).state_dict()
    assert [k for k in target if k not in made or not torch.equal(made[k], target[k])] == []


@pytest.mark.parametrize("convert", [einsum, scanned, flax_fused, each_head])
def test_what_another_codebase_holds_as_one_is_found_in_both_directions(convert: Callable[[Tensors], Tensors]) -> None:
    given = numbered(TORCH)
    same(given, convert(given))
    same(convert(given), given)


def test_the_parts_of_a_compound_name_are_made_in_its_order() -> None:
    parts = ("gate", "q", "k", "v")
    given = numbered({f"layers.{i}.attn.{m}_proj.weight": (D, D) for i in LAYERS for m in (*parts, "o")})
    fused = {f"h.{i}.attn.out.weight": given[f"layers.{i}.attn.o_proj.weight"] for i in LAYERS}
    for i in LAYERS:
        fused[f"h.{i}.attn.gqkv.weight"] = torch.cat([given[f"layers.{i}.attn.{m}_proj.weight"] for m in parts])
    same(fused, given)
    same(given, fused)


def test_a_name_that_lists_other_parts_is_not_taken_for_these() -> None:
    source = {f"h.{i}.mlp.gate_up_proj.weight": spec(3 * D, D) for i in LAYERS}
    source |= {f"h.{i}.mlp.down_proj.weight": spec(D, 24) for i in LAYERS}
    target = {f"layers.{i}.mlp.{m}.weight": spec(24, D) for i in LAYERS for m in ("w1", "w3")}
    target |= {f"layers.{i}.mlp.w2.weight": spec(D, 24) for i in LAYERS}
    target |= {f"layers.{i}.attn.{m}_proj.weight": spec(D, D) for i in LAYERS for m in "qkv"}
    made = cs.plan({k: torch.zeros(s.shape) for k, s in source.items()}, cs.suggest(source, target).recipe).specs
    assert set(made) == {k for k in target if ".mlp." in k}


def test_one_table_for_all_layers_is_an_assumption() -> None:
    names = {"query": "q", "key": "k", "value": "v", "output": "o"}
    source = {f"enc.h.{i}.attn.{m}.weight": spec(D, D) for i in LAYERS for m in names}
    target = {f"layers.{i}.attention.{m}_proj.weight": spec(D, D) for i in LAYERS for m in names.values()}
    source["enc.relative_bias.weight"] = spec(12, H)
    tables = {f"layers.{i}.attention.relative_attention_bias.weight" for i in LAYERS}
    found = cs.suggest(source, target | dict.fromkeys(tables, spec(12, H)))
    assert found.coverage == 1.0
    assert {k for a in found.assumptions if a.kind == "shared" for k in a.keys} == tables
