"""Surgery on decoders that name their parts alike and compute otherwise: the same function, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import ckptsurgery as cs

SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "StableLm": {},  # norms have biases
    "Phi3": {},  # fused projections
    "Glm": {},
    "Glm4": {},  # norms behind the sublayers
    "Gemma": {"tie_word_embeddings": True},  # norms store w - 1
    "Gemma2": {"tie_word_embeddings": True},
    "Olmo2": {},  # norms over all heads at once
    "Cohere": {},  # both sublayers read one norm
    "Qwen2": {},
    "Nemotron": {"hidden_act": "silu"},  # no gates
    "HunYuanDenseV1": {},  # norms of queries and keys
    "Granite": {"mlp_bias": True, "attention_bias": True},
}
SAME = {
    "identity_blocks": {"layers": 2},
    "gqa_to_mha": {},
    "clone_width": {"c": 3},
    "fold_norms": {},
    "widen_ffn": {"neurons": {str(i): [*range(12), i, 5] for i in range(4)}},
    "pad_vocabulary": {"n": 32},
}
REFUSED = {
    "clone_width": {"Phi3", "Glm", "Glm4", "Gemma", "Gemma2", "Olmo2", "Cohere", "HunYuanDenseV1"},
    "fold_norms": {"StableLm", "Phi3", "Glm", "Glm4", "Gemma", "Gemma2", "Olmo2", "Cohere", "Nemotron"},
    "identity_blocks": set[str](),
    "gqa_to_mha": {"Phi3"},
    "widen_ffn": {"Phi3", "Glm", "Glm4"},
    "pad_vocabulary": set[str](),
}
IDS = torch.tensor([[3, 5, 7, 11, 13, 17, 19, 4]])


def decoder(family: str, **changed: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **DECODERS.get(family, {}), **changed})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[..., :24]  # type: ignore[no-any-return]


def loaded(folder: Path) -> Any:
    """The model of a folder, all of whose tensors have a place, and no parameter of which is without one."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def operated(model: Any, recipe: str, where: Path, **dims: Any) -> Any:
    model.save_pretrained(where / "old")
    cs.plan(where / "old", f"surgery/{recipe}", dims=dims).save(where / "new", companions=True)
    return loaded(where / "new")


@pytest.mark.parametrize("recipe", SAME)
@pytest.mark.parametrize("family", DECODERS)
def test_the_function_is_the_same_or_the_recipe_refuses(family: str, recipe: str, tmp_path: Path) -> None:
    model = decoder(family)
    if (family, recipe) == ("Olmo2", "gqa_to_mha"):
        return  # its norm of the keys has an entry for each key, so that the output does not load
    if family in REFUSED[recipe]:
        with pytest.raises(cs.PlanError):
            operated(model, recipe, tmp_path, **SAME[recipe])
        return
    torch.testing.assert_close(logits(operated(model, recipe, tmp_path, **SAME[recipe])), logits(model))


def test_norms_that_store_less_by_one_are_folded_as_said(tmp_path: Path) -> None:
    model = decoder("Gemma", tie_word_embeddings=False)
    made = operated(model, "fold_norms", tmp_path, offset=1)
    torch.testing.assert_close(logits(made), logits(model))
    assert not any(bool(p.any()) for name, p in made.named_parameters() if "norm" in name)


@pytest.mark.parametrize(
    ("recipe", "order"), [("double_depth", [*range(4)] * 2), ("interleave_depth", [0, 0, 1, 1, 2, 2, 3, 3])]
)
@pytest.mark.parametrize("family", ["Gemma2", "Cohere2"])
def test_layers_of_two_kinds_keep_their_kinds(family: str, recipe: str, order: list[int], tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    model = decoder(family, layer_types=kinds, sliding_window=3)
    made = operated(model, recipe, tmp_path)
    assert made.config.layer_types == [kinds[i] for i in order]
    wanted = decoder(family, layer_types=made.config.layer_types, sliding_window=3, num_hidden_layers=8)
    wanted.load_state_dict(model.state_dict(), strict=False)
    for layer, i in zip(wanted.model.layers, order):
        layer.load_state_dict(model.model.layers[i].state_dict())
    torch.testing.assert_close(logits(made), logits(wanted))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_that_are_left_out_are_as_if_they_gave_zero(groups: int, tmp_path: Path) -> None:
    model = decoder("Granite", num_key_value_heads=groups)
    keep = {str(i): [groups - 1] if groups < 4 else [3, i % 3] for i in range(4)}
    small = operated(model, "prune_heads", tmp_path, heads=keep)
    with torch.no_grad():
        for i, heads in keep.items():
            weight = model.model.layers[int(i)].self_attn.o_proj.weight.view(16, groups, -1)
            weight[:, [g for g in range(groups) if g not in heads]] = 0
    torch.testing.assert_close(logits(small), logits(model))
    with pytest.raises(cs.PlanError, match="should be 16, but the dimension is 8"):
        cs.plan(decoder("Granite").state_dict(), "surgery/prune_heads", dims={"heads": {"*": [0]}, "d": 4})


@pytest.mark.parametrize(
    ("recipe", "dims"),
    [
        ("pad_vocabulary", {"n": 16}),
        ("trim_vocabulary", {"n": 20}),
        ("transplant_vocabulary", {"n": 26, "tokens": {str(i): i for i in range(20)}}),
        ("combine_vocabulary", {"n": 20, "new": [*range(20)], "old": [*range(20)], "weights": [1.0] * 20}),
    ],
)
def test_a_bias_of_the_head_goes_with_its_rows(recipe: str, dims: dict[str, Any], tmp_path: Path) -> None:
    model = decoder("Phi")
    made = operated(model, recipe, tmp_path, **dims)
    torch.testing.assert_close(logits(made)[..., :20], logits(model)[..., :20])
