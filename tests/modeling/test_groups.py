"""Parameter groups hold each trainable parameter once, with the rate of its layer and decay where it belongs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from ckptsurgery.errors import LoadError
from ckptsurgery.modeling.groups import param_groups


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


def staged() -> nn.Module:
    def stage(down: bool) -> nn.Module:
        blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)])
        return nn.ModuleDict({"downsample": nn.Linear(4, 4) if down else nn.Identity(), "blocks": blocks})

    return nn.ModuleDict(
        {"stem": nn.Linear(4, 4), "stages": nn.ModuleList([stage(False), stage(True)]), "head": nn.Linear(4, 2)}
    )


def by_name(groups: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    return {name: group for group in groups for name in group["names"]}  # type: ignore[attr-defined]


def test_rates_fall_by_the_layer_decay_from_the_head_to_the_embedding() -> None:
    found = by_name(param_groups(vit(), layers="vit.layers.{i}", layer_decay=0.5, lr=1.0))
    assert found["vit.embeddings.cls_token"]["lr"] == 0.5**4
    assert [found[f"vit.layers.{i}.mlp.fc1.weight"]["lr_scale"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert found["vit.layernorm.weight"]["lr"] == found["classifier.bias"]["lr"] == 1.0


def test_biases_and_norms_do_not_decay() -> None:
    for name, group in by_name(param_groups(vit(), weight_decay=0.3)).items():
        exempt = name.endswith("bias") or "norm" in name
        assert group["weight_decay"] == (0.0 if exempt else 0.3), name


def test_nested_stages_are_counted_through_and_what_stands_between_goes_with_the_later() -> None:
    layer = {n: g["layer"] for n, g in by_name(param_groups(staged(), layers="stages.{s}.blocks.{b}")).items()}
    assert layer["stem.weight"] == 0 and layer["head.weight"] == 5
    assert [layer[f"stages.{s}.blocks.{b}.0.weight"] for s in range(2) for b in range(2)] == [1, 2, 3, 4]
    assert layer["stages.1.downsample.weight"] == 3


def test_ten_layers_count_as_numbers_and_not_as_words() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1) for _ in range(12)])})
    layer = {n: g["layer"] for n, g in by_name(param_groups(model, layers="blocks.{i}")).items()}
    assert [layer[f"blocks.{i}.weight"] for i in range(12)] == list(range(1, 13))


@given(st.sets(st.integers(0, 12)), st.sampled_from([None, "stages.{s}", "stages.{s}.blocks.{b}"]))
def test_every_trainable_parameter_is_in_one_group_and_no_frozen_one_is(frozen: set[int], layers: str | None) -> None:
    model = staged()
    parameters = list(model.parameters())
    for at in frozen:
        parameters[at].requires_grad_(False)
    groups = param_groups(model, layers=layers)
    held = [p for group in groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in parameters if p.requires_grad)
    names = dict(model.named_parameters())
    assert all(names[n] is p for g in groups for n, p in zip(g["names"], g["params"], strict=True))


def test_tied_parameters_are_counted_once_by_their_first_name() -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6, bos_token_id=0, eos_token_id=0)
    groups = param_groups(GPT2LMHeadModel(config), layers="transformer.h.{i}")
    assert by_name(groups)["transformer.wte.weight"]["layer"] == 0 and "lm_head.weight" not in by_name(groups)
    torch.optim.AdamW(groups)


def test_an_optimizer_takes_the_groups_as_they_are_and_uses_their_rates() -> None:
    model = staged()
    optimizer = torch.optim.AdamW(param_groups(model, layers="stages.{s}", layer_decay=0.1, lr=0.01), lr=123.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    moved = {n: (p - before[n]).abs().mean().item() for n, p in model.named_parameters()}
    assert moved["head.bias"] == pytest.approx(0.01, rel=1e-3) and moved["stem.bias"] == pytest.approx(1e-5, rel=0.05)


def test_what_the_model_itself_exempts_does_not_decay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 4, 2))
            self.body, self.flagged = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2))
            self.flagged._no_weight_decay = True

        def no_weight_decay(self) -> set[str]:
            return {"pos_embed", "dist_token"}

    found = by_name(param_groups(nn.ModuleDict({"m": Model()})))
    assert {n for n, g in found.items() if not g["weight_decay"]} == {"m.pos_embed", "m.flagged", "m.body.bias"}


@pytest.mark.parametrize(
    ("no_decay", "exempt"),
    [
        ("bias", {"0.bias", "1.bias", "2.in_proj_bias", "2.out_proj.bias"}),
        ("norm", {"0.bias", "1.weight", "1.bias", "2.in_proj_bias", "2.out_proj.bias"}),
        ("none", set()),
        (["1", "0.weight"], {"1.weight", "1.bias", "0.weight"}),
        ("{i}.bias", {"0.bias", "1.bias"}),
        ([nn.LayerNorm], {"1.weight", "1.bias"}),
    ],
)
def test_what_is_exempt_can_be_said(no_decay: object, exempt: set[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.MultiheadAttention(2, 1))
    found = by_name(param_groups(model, no_decay=no_decay))  # type: ignore[arg-type]
    assert {n for n, g in found.items() if not g["weight_decay"]} == exempt


def test_first_and_last_overrule_where_a_tensor_stands() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = nn.Parameter(torch.ones(()))
            self.blocks = nn.ModuleList([nn.Linear(2, 2)])
            self.late = nn.Embedding(2, 2)

    found = by_name(param_groups(Clip(), layers="blocks.{i}", first="late", last=["logit_scale"]))
    assert found["logit_scale"]["layer"] == 2 and found["late.weight"]["layer"] == 0


@pytest.mark.parametrize(
    ("layers", "says"), [("block.{i}", "no module path matches 'block.{i}'"), (["stages.{s}", "x.{i}"], "x.{i}")]
)
def test_a_pattern_without_layers_is_an_error(layers: object, says: str) -> None:
    with pytest.raises(LoadError) as caught:
        param_groups(staged(), layers=layers)  # type: ignore[arg-type]
    assert says in str(caught.value)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(LoadError, match="frozen"):
        param_groups(nn.Linear(1, 1).requires_grad_(False))
