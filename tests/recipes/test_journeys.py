"""Any codebase to any other: recipes inverted and chained, run as one pass, through layouts that both sides know."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import pytest
from conversions import Tensors, hashes, pair, same

import ckptsurgery as cs


@dataclass(frozen=True)
class Journey:
    """Where it starts, which way it goes, and how its end is known.

    Args:
        proof: the pair whose source is numbered, and whose expected hashes the end must have.
        start: recipes that lead from that source to the start of the journey; "^" in front of a name inverts it.
        way: the journey itself.
        returns: whether it must end at the numbered source instead.
    """

    proof: str
    start: str
    way: str
    returns: bool = False

    @property
    def config(self) -> dict[str, int]:
        """What the configs of both sides say of heads and depths."""
        config = dict(pair(self.proof).config or {})
        heads, groups = config.get("num_attention_heads", 4), config.get("num_key_value_heads", 2)
        return {"num_attention_heads": heads, "num_key_value_heads": groups, "n_heads": heads, "n_kv_heads": groups,
                "depths": [1, 2, 2, 3, 3, 4, 1]} | config  # fmt: skip


JOURNEYS = {
    "litgpt -> hf -> torchtune": Journey(
        proof="hf_llama__torchtune",
        start="llama/hf_to_litgpt",
        way="^llama/hf_to_litgpt llama/hf_to_torchtune",
    ),
    "torchtune -> hf -> curated": Journey(
        proof="hf_llama__curated",
        start="llama/hf_to_torchtune",
        way="^llama/hf_to_torchtune llama/hf_to_curated",
    ),
    "curated -> hf -> litgpt": Journey(
        proof="hf_llama__litgpt",
        start="llama/hf_to_curated",
        way="^llama/hf_to_curated llama/hf_to_litgpt",
    ),
    "meta -> hf -> torchtune": Journey(
        proof="meta_llama__torchtune",
        start="",
        way="llama/meta_to_hf llama/hf_to_torchtune",
    ),
    "gguf -> hf -> meta -> hf": Journey(
        proof="hf_llama__gguf",
        start="llama/hf_to_gguf",
        way="^llama/hf_to_gguf ^llama/meta_to_hf llama/meta_to_hf",
        returns=True,
    ),
    "gguf -> hf -> litgpt -> hf -> gguf": Journey(
        proof="hf_llama__gguf",
        start="llama/hf_to_gguf",
        way="^llama/hf_to_gguf llama/hf_to_litgpt ^llama/hf_to_litgpt llama/hf_to_gguf",
    ),
    "litgpt -> checkpoint -> transformers 5, Mixtral": Journey(
        proof="hf4_mixtral__hf5",
        start="mixtral/hf_to_litgpt",
        way="^mixtral/hf_to_litgpt mixtral/hf_to_hf5",
    ),
    "litgpt -> hub -> transformers 5, Qwen3-MoE": Journey(
        proof="hub_qwen3_moe__hf5",
        start="qwen3_moe/hf_to_litgpt",
        way="^qwen3_moe/hf_to_litgpt moe/hf_to_hf5",
    ),
    "litgpt -> hf -> curated, GPT-NeoX": Journey(
        proof="hf_gptneox__curated",
        start="gpt_neox/hf_to_litgpt",
        way="^gpt_neox/hf_to_litgpt gpt_neox/hf_to_curated",
    ),
    "torchvision -> timm -> transformers 4 -> 5, ViT": Journey(
        proof="tv_vit__hf5_vit",
        start="",
        way="vit/tv_to_timm vit/timm_to_hf vit/hf_to_hf5",
    ),
    "torchvision -> transformers 5 -> 4 -> timm, ViT": Journey(
        proof="tv_vit__timm_vit",
        start="",
        way="vit/tv_to_hf5 ^vit/hf_to_hf5 ^vit/timm_to_hf",
    ),
    "torchvision -> timm -> transformers, Swin": Journey(
        proof="timm_swin__hf4_swin",
        start="^swin/tv_to_timm",
        way="swin/tv_to_timm swin/timm_to_hf",
    ),
    "torchvision -> timm -> authors -> transformers, ConvNeXt": Journey(
        proof="fb_convnext__hf4",
        start="convnext/fb_to_timm ^convnext/tv_to_timm",
        way="convnext/tv_to_timm ^convnext/fb_to_timm convnext/fb_to_hf",
    ),
    "lukemelas -> timm -> torchvision, EfficientNet": Journey(
        proof="tv_efficientnet_b0__timm",
        start="efficientnet/tv_to_timm ^efficientnet/lukemelas_to_timm",
        way="efficientnet/lukemelas_to_timm ^efficientnet/tv_to_timm",
        returns=True,
    ),
    "transformers -> timm -> paddle, ResNet": Journey(
        proof="tv_resnet18__paddle",
        start="resnet/tv_to_hf",
        way="^resnet/tv_to_hf resnet/tv_to_paddle",
    ),
}


def steps(names: str) -> list[cs.Recipe]:
    return [cs.load_recipe(n.removeprefix("^")).inverse() if n[0] == "^" else cs.load_recipe(n) for n in names.split()]


def one_by_one(tensors: Tensors, names: str, config: dict[str, int]) -> Tensors:
    for recipe in steps(names):
        tensors = cs.plan(tensors, recipe, config=config).state_dict()
    return tensors


@pytest.mark.parametrize("journey", JOURNEYS.values(), ids=JOURNEYS)
def test_one_pass_ends_where_the_truth_says(journey: Journey) -> None:
    case = pair(journey.proof)
    numbered = case.numbered()
    start = one_by_one(numbered, journey.start, journey.config)
    plan = cs.plan(start, reduce(cs.Recipe.then, steps(journey.way)), config=journey.config)
    end = plan.state_dict()
    assert same(end, numbered) if journey.returns else hashes(end) == case.expected
    assert same(end, one_by_one(start, journey.way, journey.config))


def test_a_chain_of_renames_copies_and_computes_nothing() -> None:
    case = pair("tv_efficientnet_b0__timm")
    way = cs.load_recipe("efficientnet/tv_to_timm").then(cs.load_recipe("efficientnet/lukemelas_to_timm").inverse())
    plan = cs.plan(case.headers(), way, config={"depths": [1, 2, 2, 3, 3, 4, 1]})
    assert {step.kind for step in plan.steps} == {"copy"}
    assert all(len(step.sources) == len(step.targets) == 1 for step in plan.steps)


def test_a_layout_that_sits_deeper_is_reached_by_a_scope() -> None:
    # Paddle's encoder has its layers at the top, the other recipe wants them under "encoder."
    case = pair("torch_TransformerEncoder__hf5_bert_encoder")
    to_paddle = cs.load_recipe("transformer/torch_to_paddle").scoped(source="encoder.")
    paddle = cs.plan(case.numbered(), to_paddle).state_dict()
    journey = to_paddle.inverse().then(cs.load_recipe("bert/torch_to_hf"))
    assert hashes(cs.plan(paddle, journey).state_dict()) == case.expected
