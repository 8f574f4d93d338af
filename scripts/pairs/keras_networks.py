"""Networks in the layouts of keras_hub."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers as hf
from networks import GROUPED, TINY, shapes
from pairing import Network, Numbers
from torch import nn


class _Loader:
    """Gives the numbers where the library reads a file."""

    def __init__(self, given: Numbers) -> None:
        self.given, self.prefix = given, ""

    def get_tensor(self, key: str) -> Any:
        return self.given[self.get_prefixed_key(key, None)].numpy()

    def get_prefixed_key(self, key: str, like: Any) -> str:
        # A bare model has no prefix where the library expects the one of a model with a head.
        near = (k for k in self.given if k.endswith("." + key) or key.endswith("." + k))
        return key if key in self.given else next(near)

    def port_weight(self, keras_variable: Any, hf_weight_key: str, hook_fn: Any = None) -> None:
        tensor = self.get_tensor(hf_weight_key)
        if hook_fn:
            tensor = hook_fn(tensor, list(keras_variable.shape))
        keras_variable.assign(tensor)


def keras_net(model: nn.Module, file: str, backbone: str, drop: str = "^$") -> Network:
    """What one of keras_hub's converters makes of a transformers model."""
    import importlib
    import os

    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import keras_hub

    keras.config.set_floatx("float64")
    library = importlib.import_module(f"keras_hub.src.utils.transformers.{file}")
    config = {"num_hidden_layers": model.config.num_hidden_layers, **model.config.to_dict()}
    made = getattr(keras_hub.models, backbone)(**library.convert_backbone_config(config), dtype="float64")

    def convert(given: Numbers) -> Numbers:
        for variable in made.weights:
            variable.assign(torch.full(tuple(variable.shape), -1.0, dtype=torch.float64))
        library.convert_weights(made, _Loader(given), config)
        return {v.path: torch.as_tensor(v.value).detach().cpu().clone() for v in made.weights}

    found = {k: s for k, s in shapes(model.state_dict()).items() if not re.search(drop, k)}
    return Network(found, convert)


def keras_bart(layers: int = 2) -> Network:
    config = hf.BartConfig(
        d_model=32,
        encoder_layers=layers,
        decoder_layers=layers,
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
    return keras_net(hf.BartModel(config), "convert_bart", "BartBackbone", "(en|de)coder.embed_tokens")


def keras_distilbert(layers: int = 3) -> Network:
    config = hf.DistilBertConfig(
        dim=32, hidden_dim=96, n_layers=layers, n_heads=4, vocab_size=53, pad_token_id=0, max_position_embeddings=20
    )
    return keras_net(hf.DistilBertModel(config), "convert_distilbert", "DistilBertBackbone")


def keras_gemma(layers: int = 3) -> Network:
    config = hf.GemmaConfig(**{**GROUPED, "num_hidden_layers": layers}, head_dim=8)
    return keras_net(hf.GemmaModel(config), "convert_gemma", "GemmaBackbone")


def keras_esm(layers: int = 3) -> Network:
    config = hf.EsmConfig(
        **{**TINY, "num_hidden_layers": layers},
        position_embedding_type="rotary",
        max_position_embeddings=20,
        emb_layer_norm_before=False,
        mask_token_id=3,
    )
    return keras_net(
        hf.EsmModel(config, add_pooling_layer=False),
        "convert_esm",
        "ESMBackbone",
        "inv_freq|contact|position_embeddings",
    )
