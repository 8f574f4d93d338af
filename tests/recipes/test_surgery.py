"""Surgery on small models: the function that the result computes is the one that was promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import ckptsurgery as cs

SIZES: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": False, "attn_implementation": "eager",
}  # fmt: skip
IDS = torch.arange(12).reshape(2, 6)


def decoder(**sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.3)
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def operated(model: nn.Module, name: str, result: nn.Module, **dims: Any) -> nn.Module:
    plan = cs.plan(model.state_dict(), f"surgery/{name}", config=model.config.to_dict(), dims=dims)
    result.load_state_dict(plan.state_dict(), strict=True)
    return result.eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def again(model: LlamaForCausalLM, order: list[int]) -> Tensor:
    """The outputs of a model whose layers run in this order."""
    layers = model.model.layers
    deep = decoder(num_hidden_layers=len(order))
    deep.load_state_dict(model.state_dict(), strict=False)
    for n, i in enumerate(order):
        deep.model.layers[n].load_state_dict(layers[i].state_dict())
    return outputs(deep)


def test_a_stack_twice_runs_twice() -> None:
    model = decoder()
    deep = operated(model, "double_depth", decoder(num_hidden_layers=8))
    close(outputs(deep), again(model, [0, 1, 2, 3, 0, 1, 2, 3]))


def test_layers_in_a_row_run_in_a_row() -> None:
    model = decoder()
    deep = operated(model, "interleave_depth", decoder(num_hidden_layers=8))
    close(outputs(deep), again(model, [0, 0, 1, 1, 2, 2, 3, 3]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_identity_blocks_change_nothing(size: int) -> None:
    model = decoder()
    deep = operated(model, "identity_blocks", decoder(num_hidden_layers=4 + 4 // size), layers=size, last=size - 1)
    close(outputs(deep), outputs(model))
    assert not deep.model.layers[size].self_attn.o_proj.weight.any()


def test_groups_become_heads_and_compute_the_same() -> None:
    model = decoder(num_key_value_heads=2)
    whole = operated(model, "gqa_to_mha", decoder())
    close(outputs(whole), outputs(model))


def test_the_mean_of_equal_heads_is_the_head() -> None:
    model = operated(decoder(num_key_value_heads=2), "gqa_to_mha", decoder())
    grouped = operated(model, "mha_to_gqa", decoder(num_key_value_heads=2), g=2)
    close(outputs(grouped), outputs(model))


def test_the_keys_of_a_group_are_the_mean_of_its_heads() -> None:
    model = decoder()
    grouped = operated(model, "mha_to_gqa", decoder(num_key_value_heads=2), g=2)
    old, new = (m.model.layers[1].self_attn.k_proj.weight.detach() for m in (model, grouped))
    close(new.reshape(2, 4, 16), old.reshape(2, 2, 4, 16).mean(1))


def test_experts_that_are_copies_compute_as_the_mlp_did() -> None:
    model = decoder()
    config = model.config.to_dict()
    plan = cs.plan(model.state_dict(), "surgery/dense_to_moe", config=config, dims={"e": 3})
    made = plan.state_dict()
    assert made["model.layers.2.mlp.gate.weight"].shape == (3, 16)
    sizes = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None}
    mixture = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    mixture.load_state_dict(cs.plan(made, "moe/hf_to_hf5", target=mixture).state_dict(), strict=True)
    mixture.config.rope_parameters = model.config.rope_parameters
    rope = model.model.rotary_emb
    mixture.model.rotary_emb.load_state_dict(rope.state_dict())
    mixture.model.rotary_emb.inv_freq = rope.inv_freq
    for norm in [m for m in mixture.modules() if type(m).__name__.endswith("RMSNorm")]:
        norm.variance_epsilon = model.config.rms_norm_eps
    close(outputs(mixture), outputs(model))


@pytest.mark.parametrize("groups", [4, 2])
def test_a_model_of_twice_the_width_computes_the_same(groups: int) -> None:
    model = decoder(num_key_value_heads=groups)
    wide = decoder(hidden_size=32, intermediate_size=24, num_attention_heads=8, num_key_value_heads=2 * groups)
    close(outputs(operated(model, "clone_width", wide)), outputs(model))


def test_heads_that_are_left_out_are_as_if_they_gave_zero() -> None:
    model = decoder()
    keep = {"0": [0, 2], "1": [3, 1], "2": [0, 1], "3": [2, 3]}
    small = operated(
        model, "prune_heads", decoder(num_attention_heads=2, num_key_value_heads=2, head_dim=4), heads=keep
    )
    with torch.no_grad():
        for i, heads in keep.items():
            weight = model.model.layers[int(i)].self_attn.o_proj.weight
            weight.view(16, 4, 4)[:, [h for h in range(4) if h not in heads]] = 0
    close(outputs(small), outputs(model))


def test_neurons_that_are_left_out_are_as_if_they_gave_zero() -> None:
    model = decoder()
    keep = {str(i): [(i + n) % 12 for n in range(7)] for i in range(4)}
    small = operated(model, "prune_ffn", decoder(intermediate_size=7), neurons=keep)
    with torch.no_grad():
        for i, neurons in keep.items():
            model.model.layers[int(i)].mlp.down_proj.weight[:, [n for n in range(12) if n not in neurons]] = 0
    close(outputs(small), outputs(model))


def test_folded_norms_compute_the_same() -> None:
    model = decoder()
    folded = operated(model, "fold_norms", decoder())
    close(outputs(folded), outputs(model))
    assert all(bool((p == 1).all()) for n, p in folded.named_parameters() if "norm" in n)


class Block(nn.Module):
    """A residual block as torchvision writes one."""

    def __init__(self, bias: bool, shortcut: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=bias), nn.BatchNorm2d(3)
        self.downsample = nn.Sequential(nn.Conv2d(3, 3, 1, bias=bias), nn.BatchNorm2d(3)) if shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) + self.downsample(x)


class Network(nn.Module):
    def __init__(self, bias: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, bias=bias), nn.BatchNorm2d(3)
        self.layer1 = nn.Sequential(Block(bias, shortcut))
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.bn1(self.conv1(x))).mean((2, 3)))


@pytest.mark.parametrize("shortcut", [True, False])
def test_folded_batch_norms_compute_the_same(shortcut: bool) -> None:
    torch.manual_seed(0)
    model = Network(bias=False, shortcut=shortcut)
    images = torch.randn(4, 3, 8, 8)
    model(images)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model.eval()
    folded = Network(bias=True, shortcut=shortcut).eval()
    for module in (folded, *folded.layer1):
        module.bn1 = nn.Identity()
        if isinstance(module, Block) and shortcut:
            module.downsample[1] = nn.Identity()
    folded.load_state_dict(cs.plan(model.state_dict(), "surgery/fold_batchnorm").state_dict(), strict=True)
    close(folded(images), model(images))
