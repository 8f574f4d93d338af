"""Every recipe of a model with a head over its vocabulary, on the tied and the untied model, forward and back.

A codebase either holds the head always, as another name of the embedding where they are tied, or only where they are
not. The pairs of the corpus show each codebase's keys; their heads are untied, or taken away.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conversions import Tensors, pair, same

import ckptsurgery as cs


class Side(NamedTuple):
    """Head and embedding of a codebase, and whether it holds the head where it is tied."""

    head: str
    embedding: str
    always: bool = False


HF = Side("lm_head.weight", "model.embed_tokens.weight")
HF_MODEL = HF._replace(always=True)
LIT = Side("lm_head.weight", "transformer.wte.weight", always=True)
TUNE = Side("output.weight", "tok_embeddings.weight")
META = TUNE._replace(always=True)
NEOX = Side("embed_out.weight", "gpt_neox.embed_in.weight")
CURATED = Side("output_embeddings.weight", "decoder.embeddings.piece_embeddings.weight")
GGUF = Side("output.weight", "token_embd.weight")
GPT2 = Side("lm_head.weight", "transformer.wte.weight")

CASES = {
    "llama/hf_to_litgpt": ("hf_llama__litgpt", HF, LIT),
    "qwen3/hf_to_litgpt": ("hf_qwen3__litgpt", HF, LIT),
    "qwen3_moe/hf_to_litgpt": ("hf_qwen3_moe__litgpt", HF, LIT),
    "mixtral/hf_to_litgpt": ("hf_mixtral__litgpt", HF, LIT),
    "phi3/hf_to_litgpt": ("hf_phi3__litgpt", HF, LIT),
    "gpt_neox/hf_to_litgpt": ("hf_gptneox__litgpt", NEOX, LIT),
    "gpt_neox/hf_to_curated": ("hf_gptneox__curated", NEOX, CURATED),
    "llama/hf_to_torchtune": ("hf_llama__torchtune", HF, TUNE),
    "qwen2/hf_to_torchtune": ("hf_qwen2_tied__torchtune", HF, TUNE),
    "phi3/hf_to_torchtune": ("hf_phi3__torchtune", HF, TUNE),
    "llama/hf_to_gguf": ("hf_llama__gguf", HF, GGUF),
    "qwen2/hf_to_gguf": ("hf_qwen2__gguf", HF, GGUF),
    "llama/hf_to_curated": ("hf_llama__curated", HF, CURATED),
    "llama/meta_to_hf": ("meta_llama__hf4_llama", META, HF),
    "llama/meta_to_torchtune": ("meta_llama__torchtune", META, TUNE),
    "llama/hf_to_hf5": ("hf4_llama_tied__hf5", HF, HF_MODEL),
    "gpt2/hf_to_nanogpt": ("hf5_gpt2__nanogpt", GPT2, GPT2._replace(always=True)),
    "gpt2/hf_to_hf5": ("hf4_gpt2__hf5", GPT2, GPT2._replace(always=True)),
}
NEVER_UNTIED = {"gpt2/hf_to_nanogpt", "gpt2/hf_to_hf5"}


def checkpoint(name: str, side: Side, tied: bool) -> Tensors:
    """A pair's source with its head tied as the codebase ties it, or with a head of its own."""
    made = {k: v.clone() for k, v in pair(name).numbered().items() if k != side.head}
    embedding = made[side.embedding]
    if not tied:
        return made | {side.head: embedding + 1}
    return made | {side.head: embedding} if side.always else made


def assert_head(tensors: Tensors, side: Side, tied: bool) -> None:
    assert (side.head in tensors) == (side.always or not tied)
    if tied and side.always:
        assert tensors[side.head].data_ptr() == tensors[side.embedding].data_ptr()
    elif not tied:
        assert torch.equal(tensors[side.head], tensors[side.embedding] + 1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CASES)
def test_the_head_is_where_the_target_has_it_and_comes_back(name: str, tied: bool) -> None:
    proof, start, end = CASES[name]
    if not tied and name in NEVER_UNTIED:
        with pytest.raises(cs.PlanError, match=r"different values|makes it too"):
            cs.plan(checkpoint(proof, start, tied), name, config=pair(proof).config).state_dict()
        return
    recipe, config = cs.load_recipe(name), pair(proof).config
    source = checkpoint(proof, start, tied)
    there = cs.plan(source, recipe, config=config)
    made = there.state_dict()
    assert_head(made, end, tied)
    assert made.keys() - {end.head} == set(pair(proof).expected) - {end.head}
    back = cs.plan(made, recipe.inverse(), config=config).state_dict()
    assert_head(back, start, tied)
    assert same(back, {k: v for k, v in source.items() if k not in there.dropped})
    if not there.dropped:
        assert same(there.inverse(made).state_dict(), source)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("way", ["^llama/hf_to_litgpt llama/hf_to_torchtune", "llama/meta_to_hf llama/hf_to_litgpt"])
def test_a_chain_ties_as_its_last_recipe_does(way: str, tied: bool) -> None:
    first, second = way.split()
    proof, source, _ = CASES[first.lstrip("^")]
    config = {**(pair(proof).config or {}), "num_attention_heads": 4, "num_key_value_heads": 2}
    recipe, start = cs.load_recipe(first.lstrip("^")), checkpoint(proof, source, tied)
    if first[0] == "^":
        start = cs.plan(start, recipe, config=config).state_dict()
        recipe = recipe.inverse()
    made = cs.plan(start, recipe.then(cs.load_recipe(second)), config=config).state_dict()
    assert_head(made, CASES[second][2], tied)


def test_a_target_decides_what_the_headers_leave_open() -> None:
    w = torch.ones(2, 2)
    meta = {"tok_embeddings.weight": w, "output.weight": w}
    recipe = cs.Recipe(["? output.{l} -> lm_head.{l}", "tok_embeddings.{l} -> embed.{l}"],
                       same={"? output.weight": "tok_embeddings.weight"})  # fmt: skip
    spec = cs.TensorSpec([2, 2], "F32")
    assert list(cs.plan(meta, recipe).state_dict()) == ["embed.weight"]
    assert set(cs.plan(meta, recipe, target={"embed.weight": spec, "lm_head.weight": spec}).state_dict()) == {
        "embed.weight", "lm_head.weight"
    }  # fmt: skip
    back = recipe.inverse()
    assert set(cs.plan({"embed.weight": w}, back, target={"tok_embeddings.weight": spec}).state_dict()) == {
        "tok_embeddings.weight"
    }
    assert set(cs.plan({"embed.weight": w}, back).state_dict()) == set(meta)


def test_the_way_back_by_provenance_knows_the_ties_of_its_source(tmp_path: object) -> None:
    proof, start, _ = CASES["llama/meta_to_hf"]
    source = {k: v.float() for k, v in checkpoint(proof, start, tied=True).items()}
    source[start.head] = source[start.embedding]
    cs.save(source, f"{tmp_path}/meta.safetensors")
    there = cs.plan(f"{tmp_path}/meta.safetensors", "llama/meta_to_hf", config=pair(proof).config)
    there.save(f"{tmp_path}/hf.safetensors", provenance=True)
    assert "lm_head.weight" not in cs.open(f"{tmp_path}/hf.safetensors")
    assert same(cs.inverse(f"{tmp_path}/hf.safetensors").state_dict(), source)
