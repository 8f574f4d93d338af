"""Language models built here, converted by the recipes and run: both codebases' networks agree."""

from __future__ import annotations

import pytest
import torch
from parity import assert_parity, convert, noisy
from reference_language import LitGPT, MetaLlama, NanoGPT, PaddleEncoder
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import ckptsurgery as cs
from ckptsurgery.language.toml import loads

WORDS, WIDTH, HIDDEN, LAYERS, Q, KV = 61, 32, 48, 2, 4, 2
HEADS = {"num_attention_heads": Q, "num_key_value_heads": KV}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(1))


def llama(**more: object) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=Q, num_key_value_heads=KV, rms_norm_eps=1e-6, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_llama_from_pairs_to_halves(tokens: torch.Tensor) -> None:
    meta = noisy(MetaLlama(WORDS, WIDTH, HIDDEN, LAYERS, Q, KV))
    hf = convert(meta, cs.load_recipe("llama/meta_to_hf"), llama(), {"n_heads": Q, "n_kv_heads": KV})
    assert_parity(hf(tokens).logits, meta(tokens))


@torch.no_grad()
def test_rows_in_the_wrong_order_are_told_by_the_outputs(tokens: torch.Tensor) -> None:
    meta = noisy(MetaLlama(WORDS, WIDTH, HIDDEN, LAYERS, Q, KV))
    text = cs.load_recipe("llama/meta_to_hf").dumps().replace("half two", "two half")
    hf = convert(meta, loads(text), llama(), {"n_heads": Q, "n_kv_heads": KV})
    with pytest.raises(AssertionError):
        assert_parity(hf(tokens).logits, meta(tokens))


@torch.no_grad()
def test_llama_with_a_tied_head_stays_tied(tokens: torch.Tensor) -> None:
    hf = noisy(llama(tie_word_embeddings=True))
    back = cs.load_recipe("llama/meta_to_hf").inverse()
    meta = convert(hf, back, MetaLlama(WORDS, WIDTH, HIDDEN, LAYERS, Q, KV, tied=True), HEADS)
    assert_parity(meta(tokens), hf(tokens).logits)
    assert meta.output.weight is meta.tok_embeddings.weight


@torch.no_grad()
def test_a_tied_llama_fills_one_that_is_not_where_the_recipe_says_so(tokens: torch.Tensor) -> None:
    hf = noisy(llama(tie_word_embeddings=True))
    on_disk = {k: v for k, v in hf.state_dict().items() if k != "lm_head.weight"}
    recipe = cs.load_recipe("llama/hf_to_litgpt").replace(tie={"lm_head.weight": "transformer.wte.weight"})
    lit = LitGPT(WORDS, WIDTH, HIDDEN, LAYERS, Q, KV).eval()
    lit.load_state_dict(cs.plan(on_disk, recipe).state_dict())
    assert_parity(lit(tokens), hf(tokens).logits)


@torch.no_grad()
def test_llama_from_meta_to_litgpt_in_one_pass(tokens: torch.Tensor) -> None:
    meta = noisy(MetaLlama(WORDS, WIDTH, HIDDEN, LAYERS, Q, KV))
    way = cs.load_recipe("llama/meta_to_hf").then(cs.load_recipe("llama/hf_to_litgpt"))
    lit = convert(meta, way, LitGPT(WORDS, WIDTH, HIDDEN, LAYERS, Q, KV), HEADS)
    assert_parity(lit(tokens), meta(tokens))


@torch.no_grad()
def test_mixtral_from_experts_one_by_one_to_experts_stacked(tokens: torch.Tensor) -> None:
    config = MixtralConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=Q,
        num_key_value_heads=KV, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-6, rope_theta=10000.0,
        sliding_window=None,
    )  # fmt: skip
    lit = noisy(LitGPT(WORDS, WIDTH, HIDDEN, LAYERS, Q, KV, experts=4))
    way = cs.load_recipe("mixtral/hf_to_litgpt").inverse().then(cs.load_recipe("mixtral/hf_to_hf5"))
    hf = convert(lit, way, MixtralForCausalLM(config), HEADS)
    assert hf.state_dict()["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 2 * HIDDEN, WIDTH)
    assert_parity(hf(tokens).logits, lit(tokens))


@torch.no_grad()
@pytest.mark.parametrize("back", [False, True], ids=["to linear", "to conv1d"])
def test_gpt2_conv1d_and_linear(tokens: torch.Tensor, back: bool) -> None:
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=WIDTH, n_layer=LAYERS, n_head=Q)).eval()
    nano = NanoGPT(WORDS, WIDTH, LAYERS, Q, 16).eval()
    recipe = cs.load_recipe("gpt2/hf_to_nanogpt")
    if back:
        convert(noisy(nano), recipe.inverse(), hf)
        assert hf.lm_head.weight is hf.transformer.wte.weight
    else:
        convert(noisy(hf), recipe, nano)
        assert nano.lm_head.weight is nano.transformer["wte"].weight
    assert_parity(nano(tokens), hf(tokens).logits)


def torch_encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, Q, HIDDEN, dropout=0.0, activation="gelu", layer_norm_eps=1e-5, batch_first=True
    )
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


@torch.no_grad()
def test_bert_encoder_from_torch_to_transformers() -> None:
    encoder = noisy(torch_encoder())
    config = BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=Q, intermediate_size=HIDDEN,
        layer_norm_eps=1e-5,
    )  # fmt: skip
    bert = BertForMaskedLM(config)
    convert(nn.ModuleDict({"encoder": encoder}), cs.load_recipe("bert/torch_to_hf"), bert.bert.encoder)
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    assert_parity(bert.bert.encoder(x).last_hidden_state, encoder(x))


@torch.no_grad()
def test_bert_of_2018_in_transformers_5(tokens: torch.Tensor) -> None:
    config = BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=Q, intermediate_size=HIDDEN
    )
    old, new = noisy(BertForMaskedLM(config)), BertForMaskedLM(config).eval()
    spelling = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    checkpoint = {}
    for key, tensor in old.state_dict().items():
        for now, then in spelling.items():
            key = key.replace(now, then)
        checkpoint[key] = tensor
    report = cs.plan(checkpoint, cs.load_recipe("bert/google_to_hf5"), target=new).load_into(new)
    assert report.coverage == 1.0
    assert new.cls.predictions.decoder.weight is new.bert.embeddings.word_embeddings.weight
    assert_parity(new(tokens).logits, old(tokens).logits)


@torch.no_grad()
def test_an_encoder_in_paddles_layout() -> None:
    encoder = noisy(torch_encoder())
    paddle = convert(encoder, cs.load_recipe("transformer/torch_to_paddle"), PaddleEncoder(WIDTH, Q, HIDDEN, LAYERS))
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    assert_parity(paddle(x), encoder(x))
