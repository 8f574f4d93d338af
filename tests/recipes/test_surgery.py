"""Surgery on small models: the function that the result computes is the one that was promised."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import ckptsurgery as cs
from ckptsurgery.language.dims import DimValue
from ckptsurgery.language.recipe import Scope

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
    deep = operated(model, "identity_blocks", decoder(num_hidden_layers=4 + 4 // size), layers=size)
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


def test_a_rotation_that_is_read_in_many_places_changes_nothing() -> None:
    model = decoder()
    folded = operated(model, "fold_norms", decoder())
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    turned = decoder()
    turned.load_state_dict(cs.plan({**folded.state_dict(), "rotation": rotation}, "surgery/rotate").state_dict())
    close(outputs(turned), outputs(model))
    assert not torch.allclose(turned.model.embed_tokens.weight, folded.model.embed_tokens.weight, atol=0.1)


def test_neurons_that_are_repeated_share_their_outputs() -> None:
    model = decoder()
    neurons = {str(i): [*range(12), *((3 * i + n) % 12 for n in range(5)), 0] for i in range(4)}
    wide = operated(model, "widen_ffn", decoder(intermediate_size=18), neurons=neurons)
    close(outputs(wide), outputs(model))


def test_keys_and_values_go_through_a_latent() -> None:
    model = decoder()
    state, x = model.state_dict(), torch.randn(5, 16)
    whole = cs.plan(state, "surgery/mha_to_mla", dims={"rank": 16}).state_dict()
    name = "model.layers.2.self_attn"
    up, down = whole[f"{name}.kv_b_proj.weight"], whole[f"{name}.kv_a_proj.weight"]
    assert f"{name}.k_proj.weight" not in whole and (up.shape, down.shape) == ((32, 16), (16, 16))
    close(x @ down.T @ up.T, torch.cat([x @ state[f"{name}.{p}_proj.weight"].T for p in "kv"], 1))
    cut = cs.plan(state, "surgery/mha_to_mla", dims={"rank": 5}).state_dict()
    both = torch.cat([state[f"{name}.{p}_proj.weight"] for p in "kv"]).double()
    left = torch.linalg.svdvals(both)[5:].norm()
    product = cut[f"{name}.kv_b_proj.weight"].double() @ cut[f"{name}.kv_a_proj.weight"].double()
    torch.testing.assert_close((both - product).norm(), left, rtol=1e-4, atol=1e-6)


def test_pieces_of_an_mlp_as_experts_add_up_to_it() -> None:
    model = decoder()
    plan = cs.plan(
        model.state_dict(), "surgery/granular_upcycling", config=model.config.to_dict(), dims={"g": 3, "c": 2, "e": 6}
    )
    made = plan.state_dict()
    with torch.no_grad():
        for i in range(4):
            x, mlp = torch.randn(5, 16), model.model.layers[i].mlp
            experts = [{p: made[f"model.layers.{i}.mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")}
                       for e in range(6)]  # fmt: skip
            each = [(nn.functional.silu(x @ e["gate"].T) * (x @ e["up"].T)) @ e["down"].T for e in experts]
            close(sum(each) / 6, mlp(x))  # a router that gives all the same share
            assert torch.equal(each[0], each[3])
    assert made["model.layers.0.mlp.gate.weight"].shape == (6, 16)


def test_pieces_of_an_mlp_as_experts_load_as_a_mixture_and_compute_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    dense = Qwen3ForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    fields = {
        "model_type": "'qwen3_moe'",
        "architectures": ["'Qwen3MoeForCausalLM'"],
        "num_experts": "e",
        "num_experts_per_tok": "e",
        "moe_intermediate_size": "config.intermediate_size // g",
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }
    pieces: dict[str, DimValue] = {"g": 3, "c": 2, "e": 6}
    cut = Scope(cs.Recipe(rest=None, dims=pieces), use="surgery/granular_upcycling")
    recipe = cs.Recipe(rest="keep", dims=pieces, scopes=[cut], config={"set": fields})
    (tmp_path / "up.toml").write_text(recipe.dumps())
    said = ["convert", str(tmp_path / "dense"), str(tmp_path / "moe"), "--recipe", str(tmp_path / "up.toml")]
    ran = subprocess.run([sys.executable, "-m", "ckptsurgery", *said, "--companions"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    made, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(info.values()), info
    for layer in made.model.layers:
        nn.init.zeros_(layer.mlp.gate.weight)  # a router that gives all the same share
    ids = torch.arange(10)[None]
    with torch.no_grad():
        close(made.eval()(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_of_another_vocabulary_take_their_old_rows(tied: bool) -> None:
    model = decoder(tie_word_embeddings=tied)
    tokens = {"0": 7, "3": 2, "4": 19}
    plan = cs.plan(model.state_dict(), "surgery/transplant_vocabulary", dims={"n": 6, "tokens": tokens})
    state = plan.state_dict()
    small = decoder(vocab_size=6, tie_word_embeddings=tied)
    small.load_state_dict(state)
    ids = torch.tensor([[0, 3, 4, 3]])
    with torch.no_grad():
        logits, wanted = small(ids).logits, model(torch.tensor([[7, 2, 19, 2]])).logits
    close(logits[..., [0, 3, 4]], wanted[..., [7, 2, 19]])
    embedding = model.model.embed_tokens.weight.detach()
    assert (state["model.embed_tokens.weight"][5] - embedding.mean(0)).norm() < 0.1
    if tied:
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_a_padded_vocabulary_is_trimmed_again() -> None:
    model = decoder()
    padded = operated(model, "pad_vocabulary", decoder(vocab_size=32), n=16)
    close(outputs(padded)[..., :20], outputs(model))
    again = operated(padded, "trim_vocabulary", decoder(), n=20)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


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
