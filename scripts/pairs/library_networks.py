"""Networks in the layouts of litgpt, torchtune and curated-transformers."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import transformers as hf
from networks import GROUPED, TINY, shapes
from pairing import Network, Numbers
from torch import nn


def _module(name: str, path: Path) -> Any:
    """One file of a library whose package does not import here."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        sys.modules[name] = found
    return sys.modules[name]


class _Anything(types.ModuleType):
    """A package of which only names are asked."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def lit(
    packages: Path, model: nn.Module, function: str, name: str, drop: tuple[str, ...] = (), **config: Any
) -> Network:
    """What litgpt's script makes of a transformers model."""
    for stub in (
        "litgpt",
        "litgpt.config",
        "litgpt.utils",
        "lightning",
        "lightning.fabric",
        "lightning.fabric.utilities",
        "lightning.fabric.utilities.load",
    ):
        sys.modules.setdefault(stub, _Anything(stub))
    library = _module("litgpt_conversion", packages / "litgpt/litgpt/scripts/convert_hf_checkpoint.py")
    library.NotYetLoadedTensor = type("NotYetLoadedTensor", (), {})
    given_config = types.SimpleNamespace(name=name, **config)

    def convert(given: Numbers) -> Numbers:
        made: Numbers = {}
        if function == "copy_weights_falcon":
            library.copy_weights_falcon(given_config, made, given)
        else:
            getattr(library, function)(given_config, {}, made, given)
        return made

    return Network({k: s for k, s in shapes(model.state_dict()).items() if k not in drop}, convert)


def lit_phi(packages: Path, layers: int = 3) -> Network:
    config = hf.PhiConfig(**{**TINY, "num_hidden_layers": layers})
    return lit(packages, hf.PhiForCausalLM(config), "copy_weights_phi", "phi-2")


def lit_olmo(packages: Path, layers: int = 3) -> Network:
    config = hf.Olmo2Config(**{**GROUPED, "num_hidden_layers": layers})
    return lit(packages, hf.Olmo2ForCausalLM(config), "copy_weights_olmo2", "OLMo-2", mlp_class_name="LLaMAMLP")


def tune(packages: Path, file: str, function: str, model: nn.Module, drop: str = "^$") -> Network:
    """What one of torchtune's converters makes."""
    for stub in ("torchtune", "torchtune.models"):
        sys.modules.setdefault(stub, _Anything(stub))
    base = packages / "torchtune/torchtune/models"
    _module("torchtune.models.convert_weights", base / "convert_weights.py")
    library = _module("torchtune_" + function, base / file)
    found = {k: s for k, s in shapes(model.state_dict()).items() if not re.search(drop, k)}
    return Network(found, lambda given: getattr(library, function)(given))


def tune_t5(packages: Path, layers: int = 3) -> Network:
    config = hf.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=96,
        num_layers=layers,
        num_heads=4,
        vocab_size=53,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return tune(packages, "t5/_convert_weights.py", "t5_encoder_hf_to_tune", hf.T5EncoderModel(config))


def _clip(layers: int = 3) -> nn.Module:
    tower = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 53, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2}
    return hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=24)
    )


def tune_clip(packages: Path, layers: int = 3) -> Network:
    return tune(packages, "clip/_convert_weights.py", "clip_text_hf_to_tune", _clip(layers), "position_ids")


def curated(model: nn.Module, family: str, table: str, drop: str = "^$") -> Network:
    """The renames of one of its families."""
    import importlib

    from curated_transformers.models.hf_hub.conversion import state_dict_from_hf

    transforms = getattr(importlib.import_module(f"curated_transformers.models.{family}._hf"), table)
    found = {k: s for k, s in shapes(model.state_dict()).items() if not re.search(drop, k)}
    return Network(found, lambda given: dict(state_dict_from_hf(given, transforms)))


def curated_albert(groups: int = 2) -> Network:
    config = hf.AlbertConfig(
        embedding_size=16,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=4,
        num_hidden_groups=groups,
        inner_group_num=2,
        num_attention_heads=4,
        vocab_size=53,
        max_position_embeddings=20,
        pad_token_id=0,
    )
    return curated(hf.AlbertModel(config, add_pooling_layer=False), "albert", "HF_PARAM_KEY_TRANSFORMS")


def curated_mpt(layers: int = 3) -> Network:
    config = hf.MptConfig(d_model=32, n_heads=4, n_layers=layers, expansion_ratio=3, max_seq_len=20, vocab_size=53)
    return curated(hf.MptModel(config), "mpt", "DECODER_HF_PARAM_KEY_TRANSFORMS")


def curated_falcon(layers: int = 3) -> Network:
    config = hf.FalconConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=53,
        num_kv_heads=2,
        bias=True,
        new_decoder_architecture=True,
    )
    return curated(hf.FalconForCausalLM(config), "falcon", "CAUSAL_LM_HF_PARAM_KEY_TRANSFORMS")


def curated_electra(layers: int = 3) -> Network:
    config = hf.ElectraConfig(**{**TINY, "num_hidden_layers": layers}, embedding_size=16, max_position_embeddings=20)
    return curated(hf.ElectraModel(config), "electra", "HF_PARAM_KEY_TRANSFORMS")
