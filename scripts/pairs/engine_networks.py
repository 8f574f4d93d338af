"""Networks in the layouts of inference engines: CTranslate2's, fused and numbered, and gguf's short names."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from networks import GROUPED, filled, shapes
from pairing import Network, Numbers
from torch import nn


def _numpy_free(spec: Any) -> Numbers:
    found: Numbers = {}
    for key, value in spec.variables().items():
        if isinstance(value, torch.Tensor):
            found[key] = value.detach()
        elif getattr(value, "ndim", 0) > 0 and not isinstance(value, str):
            found[key] = torch.from_numpy(value)
    return found


def ctranslate(model: nn.Module, loader: str) -> Network:
    """What one of its loaders makes of a transformers model."""
    import ctranslate2.converters.transformers as library

    def convert(given: Numbers) -> Numbers:
        return _numpy_free(getattr(library, loader)().get_model_spec(filled(model, given)))

    first = model.state_dict()
    by_place: dict[int, str] = {}
    keys = [k for k, t in first.items() if by_place.setdefault(t.data_ptr(), k) == k]
    return Network(shapes({k: first[k] for k in keys}), convert)


def ct_bart(encoder: int = 3, decoder: int = 2, norm_first: bool = False) -> Network:
    config = hf.MBartConfig if norm_first else hf.BartConfig
    model = hf.MBartForConditionalGeneration if norm_first else hf.BartForConditionalGeneration
    made = config(
        d_model=32,
        encoder_layers=encoder,
        decoder_layers=decoder,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=53,
        max_position_embeddings=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    made.normalize_before = norm_first
    made.normalize_embedding = True
    return ctranslate(model(made), "MBartLoader" if norm_first else "BartLoader")


def ct_opt(layers: int = 3) -> Network:
    config = hf.OPTConfig(
        hidden_size=32,
        ffn_dim=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=53,
        max_position_embeddings=20,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return ctranslate(hf.OPTForCausalLM(config), "OPTLoader")


def ct_t5(layers: int = 2) -> Network:
    config = hf.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=96,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=4,
        vocab_size=53,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return ctranslate(hf.T5ForConditionalGeneration(config), "T5Loader")


def ct_mpt(layers: int = 3) -> Network:
    config = hf.MptConfig(d_model=32, n_heads=4, n_layers=layers, expansion_ratio=3, max_seq_len=20, vocab_size=53)
    return ctranslate(hf.MptForCausalLM(config), "MPTLoader")


def ct_distilbert(layers: int = 3) -> Network:
    config = hf.DistilBertConfig(
        dim=32, hidden_dim=96, n_layers=layers, n_heads=4, vocab_size=53, pad_token_id=0, max_position_embeddings=20
    )
    return ctranslate(hf.DistilBertModel(config), "DistilBertLoader")


def gguf_names(model: nn.Module, arch: str, layers: int) -> Network:
    """The names that gguf's table gives."""
    import gguf

    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch), layers)
    found = shapes(model.state_dict())
    known = {k: table.get_name(k, try_suffixes=(".weight", ".bias")) for k in found}
    return Network(
        {k: s for k, s in found.items() if known[k]}, lambda g: {n: t for k, t in g.items() if (n := known[k])}
    )


def gguf_starcoder(layers: int = 3) -> Network:
    config = hf.Starcoder2Config(**{**GROUPED, "num_hidden_layers": layers})
    return gguf_names(hf.Starcoder2ForCausalLM(config), "STARCODER2", layers)


def gguf_gemma(layers: int = 3) -> Network:
    config = hf.Gemma2Config(**{**GROUPED, "num_hidden_layers": layers}, head_dim=8)
    return gguf_names(hf.Gemma2ForCausalLM(config), "GEMMA2", layers)


def gguf_mamba(layers: int = 3) -> Network:
    config = hf.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=layers, vocab_size=53, pad_token_id=0)
    return gguf_names(hf.MambaForCausalLM(config), "MAMBA", layers)


def gguf_t5(layers: int = 2) -> Network:
    config = hf.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=96,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=4,
        vocab_size=53,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return gguf_names(hf.T5ForConditionalGeneration(config), "T5", layers)
