"""The networks and converters behind the pairs; see `build.py`."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from build import Network, Numbers, Pair, deeper, negative, numbered, partial, plain
from torch import nn

warnings.filterwarnings("ignore")
_TINY = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 53,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TINY, "num_key_value_heads": 2}


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The floating-point tensors of a state dict, by shape."""
    return {k: tuple(t.shape) for k, t in tensors.items() if t.is_floating_point()}


def backwards(model: nn.Module, revert: Callable[[Numbers], Numbers]) -> Network:
    """A network whose library writes the old layout: the way back, element by element."""
    made = numbered(shapes(model.state_dict()))
    old = {k: t.detach() for k, t in revert(dict(made)).items()}
    places = torch.cat([t.reshape(-1) for t in old.values()]).long()

    def convert(given: Numbers) -> Numbers:
        flat = torch.full((sum(t.numel() for t in made.values()),), -1.0, dtype=torch.float64)
        flat[places] = torch.cat([given[k].reshape(-1) for k in old])
        return {k: flat[t.long()] for k, t in made.items()}

    return Network(shapes(old), convert)


def hub(model: nn.Module) -> Network:
    """The layout on the hub and the one in transformers."""
    from transformers.core_model_loading import revert_weight_conversion

    return backwards(model, lambda numbers: revert_weight_conversion(model, numbers))


def filled(model: nn.Module, numbers: Numbers) -> nn.Module:
    """A model that holds the numbers."""
    model = model.double()
    with torch.no_grad():
        for key, tensor in model.state_dict(keep_vars=True).items():
            if key in numbers:
                tensor.data.copy_(numbers[key])
    return model


def named(model: nn.Module, rename: Callable[[str], str | None]) -> Network:
    """A converter that changes names alone."""
    return Network(shapes(model.state_dict()), lambda g: {n: t for k, t in g.items() if (n := rename(k)) is not None})


# Transformers: the hub's layouts --------------------------------------------------------------------------------------


def jamba(layers: int = 4) -> Network:
    return hub(
        hf.JambaForCausalLM(
            hf.JambaConfig(
                **{**_GROUPED, "num_hidden_layers": layers},
                num_experts=4,
                mamba_d_state=4,
                mamba_dt_rank=6,
                attn_layer_period=2,
                attn_layer_offset=1,
                expert_layer_period=2,
                expert_layer_offset=1,
            )
        )
    )


def phimoe(layers: int = 4) -> Network:
    return hub(hf.PhimoeForCausalLM(hf.PhimoeConfig(**{**_GROUPED, "num_hidden_layers": layers}, num_local_experts=4)))


def nomic(layers: int = 3) -> Network:
    return hub(hf.NomicBertModel(hf.NomicBertConfig(**{**_TINY, "num_hidden_layers": layers})))


def gte(layers: int = 3) -> Network:
    return hub(hf.GteModel(hf.GteConfig(**{**_TINY, "num_hidden_layers": layers})))


def lfm(layers: int = 3) -> Network:
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    return hub(
        hf.Lfm2MoeForCausalLM(
            hf.Lfm2MoeConfig(
                **{**_GROUPED, "num_hidden_layers": layers},
                num_experts=3,
                moe_intermediate_size=24,
                num_dense_layers=1,
                layer_types=kinds[:layers],
            )
        )
    )


def granite(layers: int = 3) -> Network:
    config = hf.GraniteMoeConfig(**{**_GROUPED, "num_hidden_layers": layers}, num_local_experts=3)
    return hub(hf.GraniteMoeForCausalLM(config))


def videomae(layers: int = 3) -> Network:
    return hub(
        hf.VideoMAEForPreTraining(
            hf.VideoMAEConfig(
                hidden_size=32,
                intermediate_size=96,
                num_hidden_layers=layers,
                num_attention_heads=4,
                decoder_hidden_size=32,
                decoder_num_hidden_layers=2,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=96,
                image_size=32,
                patch_size=8,
                num_frames=4,
            )
        )
    )


def _resnet(*stages: str) -> Any:
    return hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 40],
        depths=[2, 1, 1, 1],
        layer_type="basic",
        out_features=list(stages),
    )


def _detection(layers: int) -> dict[str, Any]:
    return {
        "d_model": 32,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_queries": 10,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
    }


def detr(layers: int = 2) -> Network:
    config = hf.DetrConfig(**_detection(layers), backbone_config=_resnet("stage4"))
    return hub(hf.DetrForObjectDetection(config))


def deformable(layers: int = 2) -> Network:
    config = hf.DeformableDetrConfig(**_detection(layers), backbone_config=_resnet("stage2", "stage3", "stage4"))
    return hub(hf.DeformableDetrForObjectDetection(config))


def conditional(layers: int = 2) -> Network:
    config = hf.ConditionalDetrConfig(**_detection(layers), backbone_config=_resnet("stage4"))
    return hub(hf.ConditionalDetrForObjectDetection(config))


def minimax(layers: int = 3) -> Network:
    config = hf.MiniMaxM2Config(**{**_GROUPED, "num_hidden_layers": layers}, num_local_experts=3, head_dim=8)
    return hub(hf.MiniMaxM2ForCausalLM(config))


# CTranslate2: fused, numbered layouts ---------------------------------------------------------------------------------


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


def ct_codegen(layers: int = 3) -> Network:
    config = hf.GPTBigCodeConfig(
        n_embd=32, n_layer=layers, n_head=4, n_positions=20, vocab_size=53, n_inner=96, bos_token_id=1, eos_token_id=2
    )
    return ctranslate(hf.GPTBigCodeForCausalLM(config), "GPTBigCodeMHALoader")


# gguf: short names ----------------------------------------------------------------------------------------------------


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
    config = hf.Starcoder2Config(**{**_GROUPED, "num_hidden_layers": layers})
    return gguf_names(hf.Starcoder2ForCausalLM(config), "STARCODER2", layers)


def gguf_gemma(layers: int = 3) -> Network:
    config = hf.Gemma2Config(**{**_GROUPED, "num_hidden_layers": layers}, head_dim=8)
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


def gguf_stablelm(layers: int = 3) -> Network:
    config = hf.StableLmConfig(**{**_GROUPED, "num_hidden_layers": layers})
    return gguf_names(hf.StableLmForCausalLM(config), "STABLELM", layers)


# litgpt and torchtune -------------------------------------------------------------------------------------------------


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
    config = hf.PhiConfig(**{**_TINY, "num_hidden_layers": layers})
    return lit(packages, hf.PhiForCausalLM(config), "copy_weights_phi", "phi-2")


def lit_falcon(packages: Path, layers: int = 3) -> Network:
    config = hf.FalconConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=53,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        new_decoder_architecture=False,
    )
    return lit(
        packages,
        hf.FalconForCausalLM(config),
        "copy_weights_falcon",
        "falcon-7b",
        n_query_groups=1,
        n_head=4,
        head_size=8,
    )


def lit_olmo(packages: Path, layers: int = 3) -> Network:
    config = hf.Olmo2Config(**{**_GROUPED, "num_hidden_layers": layers})
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


# curated-transformers -------------------------------------------------------------------------------------------------


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
    config = hf.ElectraConfig(**{**_TINY, "num_hidden_layers": layers}, embedding_size=16, max_position_embeddings=20)
    return curated(hf.ElectraModel(config), "electra", "HF_PARAM_KEY_TRANSFORMS")


# timm and open_clip ---------------------------------------------------------------------------------------------------


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def filtered(
    model: nn.Module, original: Callable[[str], str], function: Callable[[Numbers, nn.Module], Numbers]
) -> Network:
    """A timm filter over the original names, which must give all that the model has."""
    wanted = shapes(model.state_dict())
    source = {original(k): s for k, s in wanted.items()}
    made = function(dict(numbered(source)), model)
    if {k: tuple(t.shape) for k, t in made.items()} != wanted:
        raise ValueError(f"the original names do not give the model: {sorted(made.keys() ^ wanted.keys())[:4]}")
    return Network(source, lambda given: function(dict(given), model))


def openai_clip(layers: int = 3, text_too: bool = True) -> Network:
    import open_clip
    from timm.models.vision_transformer import _convert_openai_clip

    model = open_clip.model.CLIP(
        32,
        {"image_size": 32, "layers": layers, "width": 32, "head_width": 8, "patch_size": 8},
        {"context_length": 20, "vocab_size": 53, "width": 32, "heads": 4, "layers": layers},
    )

    def convert(given: Numbers) -> Numbers:
        made = _convert_openai_clip(given, model)
        made.pop("head.bias", None)
        return made

    found = shapes(model.state_dict())
    return Network({k: s for k, s in found.items() if text_too or k.startswith("visual.")}, convert)


def regnet() -> Network:
    import torchvision
    from timm.models.regnet import _filter_fn

    params = torchvision.models.regnet.BlockParams([2, 3], [16, 24], [8, 8], [1.0, 1.0], [2, 2], 0.25)
    model = torchvision.models.regnet.RegNet(params, num_classes=10, stem_width=8)
    return Network(shapes(model.state_dict()), lambda given: _filter_fn(dict(given)))


def mvit() -> Network:
    import timm.models.mvitv2 as library

    config = library.MultiScaleVitCfg(depths=(1, 2, 2, 1), embed_dim=16, num_heads=1)
    model = library.MultiScaleVit(config, img_size=64, num_classes=10)
    starts = [0, 1, 3, 5]

    def original(key: str) -> str:
        key = re.sub(r"stages\.(\d+)\.blocks\.(\d+)", lambda m: f"blocks.{starts[int(m[1])] + int(m[2])}", key)
        return key.replace("shortcut_proj_attn", "proj").replace("head.fc", "head.projection")

    return filtered(model, original, library.checkpoint_filter_fn)


def davit() -> Network:
    from timm.models.davit import checkpoint_filter_fn

    model = _timm(
        "davit_tiny", depths=(1, 1, 2, 1), embed_dims=(16, 32, 48, 64), num_heads=(2, 2, 2, 2), num_classes=10
    )

    def original(key: str) -> str:
        key = re.sub(r"^stem\.", "stages.0.downsample.", key).replace("downsample.conv", "downsample.proj")
        key = re.sub(r"stages\.(\d+)\.downsample", r"patch_embeds.\1", key)
        key = re.sub(r"stages\.(\d+)\.blocks", r"main_blocks.\1", key)
        key = key.replace("head.norm.", "norms.").replace("head.fc.", "head.")
        return key.replace("cpe1", "cpe.0").replace("cpe2", "cpe.1")

    return filtered(model, original, checkpoint_filter_fn)


def pvt() -> Network:
    from timm.models.pvt_v2 import checkpoint_filter_fn

    model = _timm("pvt_v2_b0", depths=(2, 1, 2, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 2, 2), num_classes=10)

    def original(key: str) -> str:
        key = re.sub(r"stages\.(\d+)\.blocks\.", lambda m: f"block{int(m[1]) + 1}.", key)
        key = re.sub(r"stages\.(\d+)\.norm\.", lambda m: f"norm{int(m[1]) + 1}.", key)
        key = re.sub(r"stages\.(\d+)\.downsample", lambda m: f"patch_embed{int(m[1]) + 1}", key)
        return re.sub(r"^patch_embed\.", "patch_embed1.", key).replace(".dwconv.", ".dwconv.dwconv.")

    return filtered(model, original, checkpoint_filter_fn)


def poolformer() -> Network:
    import timm.models.metaformer as library

    checkpoint_filter_fn = library.checkpoint_filter_fn
    model = library.MetaFormer(
        depths=(1, 2, 2, 1),
        dims=(16, 24, 32, 48),
        num_classes=10,
        token_mixers=library.Pooling,
        norm_layers=library.GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
        downsample_norm=None,
    )

    def original(key: str) -> str:
        key = re.sub(r"^stem\.", "patch_embed.", key).replace("head.norm.", "norm.").replace("head.fc.", "head.")
        key = re.sub(r"stages\.(\d+)\.blocks\.", lambda m: f"network.{2 * int(m[1])}.", key)
        key = re.sub(r"stages\.(\d+)\.downsample\.", lambda m: f"network.{2 * int(m[1]) - 1}.", key)
        key = key.replace("patch_embed.conv", "patch_embed.proj")
        key = re.sub(r"^(network\.[135])\.conv", r"\1.proj", key)
        return re.sub(r"layer_scale(\d)\.scale", r"layer_scale_\1", key)

    return filtered(model, original, checkpoint_filter_fn)


def resmlp(layers: int = 3) -> Network:
    import timm.models.mlp_mixer as library

    model = library.MlpMixer(
        img_size=32,
        patch_size=8,
        num_blocks=layers,
        embed_dim=32,
        num_classes=10,
        mlp_ratio=3,
        block_layer=library.ResBlock,
        norm_layer=library.Affine,
    )
    wanted = shapes(model.state_dict())
    renamed = {
        k: k.replace("stem.", "patch_embed.").replace("linear_tokens.", "attn.").replace("mlp_channels.", "mlp.")
        for k in wanted
    }
    source = {re.sub(r"\bls(\d)", r"gamma_\1", renamed[k]): s for k, s in wanted.items()}
    source = {k: s[-1:] if k.endswith((".alpha", ".beta")) else s for k, s in source.items()}
    return Network(source, lambda given: library.checkpoint_filter_fn(dict(given), model))


def beit(layers: int = 3) -> Network:
    from timm.models.vision_transformer import _convert_beit3

    attention = {
        f"self_attn.{m}.A.{leaf}": ((32, 32) if leaf == "weight" else (32,))
        for m in ("k_proj", "v_proj", "q_proj", "out_proj")
        for leaf in ("weight", "bias")
    }
    norms = {
        f"{m}.A.{leaf}": (32,)
        for m in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm")
        for leaf in ("weight", "bias")
    }
    feed = {
        "ffn.A.fc1.weight": (96, 32),
        "ffn.A.fc1.bias": (96,),
        "ffn.A.fc2.weight": (32, 96),
        "ffn.A.fc2.bias": (32,),
        "ffn.A.ffn_layernorm.weight": (96,),
        "ffn.A.ffn_layernorm.bias": (96,),
    }
    source: dict[str, tuple[int, ...]] = {
        "beit3.vision_embed.cls_token": (1, 1, 32),
        "beit3.vision_embed.proj.weight": (32, 3, 8, 8),
        "beit3.vision_embed.proj.bias": (32,),
    }
    for i in range(layers):
        source |= {f"beit3.encoder.layers.{i}.{k}": s for k, s in {**attention, **norms, **feed}.items()}
    source |= {"fc_norm.weight": (32,), "fc_norm.bias": (32,), "head.weight": (10, 32), "head.bias": (10,)}
    return Network(source, lambda given: _convert_beit3(dict(given), None))


def from_file(
    model: nn.Module, source: Mapping[str, tuple[int, ...]], load: Callable[[nn.Module, Numbers], None]
) -> Network:
    """A library that copies arrays into its model."""

    def convert(given: Numbers) -> Numbers:
        twin = model.double()
        with torch.no_grad():
            for tensor in twin.state_dict().values():
                tensor.fill_(-1)
            load(twin, given)
        return {k: t.clone() for k, t in twin.state_dict().items() if t.is_floating_point()}

    return Network(source, convert)


def bit() -> Network:
    import timm.models.resnetv2 as library

    model = library.ResNetV2(
        layers=(2, 1),
        channels=(128, 256),
        stem_chs=32,
        num_classes=10,
        stem_type="same",
        conv_layer=library.partial(library.StdConv2d, eps=1e-8),
    )
    source: dict[str, tuple[int, ...]] = {}

    def kernel(name: str, tensor: torch.Tensor) -> None:
        source[name] = tuple(tensor.permute(2, 3, 1, 0).shape)

    for i, (_, stage) in enumerate(model.stages.named_children()):
        for j, block in enumerate(stage.blocks.children()):
            for n, letter in enumerate("abc"):
                at = f"resnet/block{i + 1}/unit{j + 1:02d}/{letter}/"
                source[at + "group_norm/gamma"] = tuple(getattr(block, f"norm{n + 1}").weight.shape)
                source[at + "group_norm/beta"] = tuple(getattr(block, f"norm{n + 1}").weight.shape)
                kernel(at + "standardized_conv2d/kernel", getattr(block, f"conv{n + 1}").weight)
                if letter == "a" and block.downsample is not None:
                    kernel(at + "proj/standardized_conv2d/kernel", block.downsample.conv.weight)
    source |= {"resnet/group_norm/gamma": (256,), "resnet/group_norm/beta": (256,), "resnet/head/conv2d/bias": (10,)}
    kernel("resnet/head/conv2d/kernel", model.head.fc.weight)
    kernel("resnet/root_block/standardized_conv2d/kernel", model.stem.conv.weight)

    def load(twin: nn.Module, given: Numbers) -> None:
        library._load_npz_checkpoint = lambda *a, **k: {n: t.numpy() for n, t in given.items()}
        library._load_weights(twin, "")

    return from_file(model, source, load)


def big_vision(stacked: bool = False, layers: int = 3) -> Network:
    import numpy
    import open_clip
    from open_clip.convert import load_big_vision_weights

    text = {
        "context_length": 16,
        "vocab_size": 53,
        "width": 32,
        "heads": 4,
        "layers": layers,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    }
    vision = {
        "image_size": 32,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "none",
    }
    import timm

    real = timm.create_model

    def small(name: str, **options: Any) -> nn.Module:
        return real(name, **options, img_size=32, patch_size=8, embed_dim=32, depth=layers, num_heads=4, mlp_ratio=3)

    timm.create_model = open_clip.timm_model.timm.create_model = small
    model = open_clip.model.CustomTextCLIP(32, vision, {**text, "mlp_ratio": 3.0}, init_logit_bias=-10)
    timm.create_model = open_clip.timm_model.timm.create_model = real
    source = (
        _flax_tower("params/img/", "encoderblock_{}", layers)
        | {
            "params/img/embedding/kernel": (8, 8, 3, 32),
            "params/img/embedding/bias": (32,),
            "params/img/pos_embedding": (1, 16, 32),
            **_flax_pool("params/img/MAPHead_0/"),
        }
        | _flax_tower("params/txt/", "encoderblock_{}", layers, "Encoder_0/")
        | {
            "params/txt/Embed_0/embedding": (53, 32),
            "params/txt/pos_embedding": (1, 16, 32),
            "params/txt/head/kernel": (32, 32),
            "params/txt/head/bias": (32,),
            "params/b": (1,),
            "params/t": (1,),
        }
    )
    source = dict(sorted(source.items()))

    def load(twin: nn.Module, given: Numbers) -> None:
        real_load = numpy.load
        numpy.load = lambda path: {n: t.numpy() for n, t in given.items()}
        try:
            load_big_vision_weights(twin, "")
        finally:
            numpy.load = real_load

    return from_file(model, source, load)


def _flax_tower(at: str, name: str, layers: int, inner: str = "Transformer/") -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        block = at + inner + name.format(i) + "/"
        for norm in ("LayerNorm_0", "LayerNorm_1"):
            found |= {block + norm + "/scale": (32,), block + norm + "/bias": (32,)}
        attention = block + "MultiHeadDotProductAttention_0/"
        for part in ("query", "key", "value"):
            found |= {attention + part + "/kernel": (32, 4, 8), attention + part + "/bias": (4, 8)}
        found |= {attention + "out/kernel": (4, 8, 32), attention + "out/bias": (32,)}
        found |= {
            block + "MlpBlock_0/Dense_0/kernel": (32, 96),
            block + "MlpBlock_0/Dense_0/bias": (96,),
            block + "MlpBlock_0/Dense_1/kernel": (96, 32),
            block + "MlpBlock_0/Dense_1/bias": (32,),
        }
    return found | {at + inner + "encoder_norm/scale": (32,), at + inner + "encoder_norm/bias": (32,)}


def _flax_pool(at: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        at + "probe": (1, 1, 32),
        at + "LayerNorm_0/scale": (32,),
        at + "LayerNorm_0/bias": (32,),
    }
    for part in ("query", "key", "value"):
        found |= {
            f"{at}MultiHeadDotProductAttention_0/{part}/kernel": (32, 4, 8),
            f"{at}MultiHeadDotProductAttention_0/{part}/bias": (4, 8),
        }
    found |= {
        at + "MultiHeadDotProductAttention_0/out/kernel": (4, 8, 32),
        at + "MultiHeadDotProductAttention_0/out/bias": (32,),
    }
    return found | {
        at + "MlpBlock_0/Dense_0/kernel": (32, 96),
        at + "MlpBlock_0/Dense_0/bias": (96,),
        at + "MlpBlock_0/Dense_1/kernel": (96, 32),
        at + "MlpBlock_0/Dense_1/bias": (32,),
    }


# keras_hub ------------------------------------------------------------------------------------------------------------


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
    config = hf.GemmaConfig(**{**_GROUPED, "num_hidden_layers": layers}, head_dim=8)
    return keras_net(hf.GemmaModel(config), "convert_gemma", "GemmaBackbone")


def keras_esm(layers: int = 3) -> Network:
    config = hf.EsmConfig(
        **{**_TINY, "num_hidden_layers": layers},
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


def keras_albert(layers: int = 2) -> Network:
    config = hf.AlbertConfig(
        embedding_size=16,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_hidden_groups=1,
        inner_group_num=1,
        num_attention_heads=4,
        vocab_size=53,
        max_position_embeddings=20,
        pad_token_id=0,
    )
    return keras_net(hf.AlbertModel(config), "convert_albert", "AlbertBackbone")


# The list -------------------------------------------------------------------------------------------------------------


def _llama_like(layers: int = 3) -> dict[str, tuple[int, ...]]:
    config = hf.StableLmConfig(**{**_GROUPED, "num_hidden_layers": layers})
    return shapes(hf.StableLmForCausalLM(config).state_dict())


def pairs(packages: Path) -> Iterator[tuple[str, Pair]]:
    """Every pair with the half it belongs to."""
    for number, make in enumerate(_listed(packages)):
        try:
            pair = make()
        except Exception as error:
            raise RuntimeError(f"pair {number} does not build: {error!r}") from error
        yield ("tuning", "held")[number % 2], pair


def _listed(packages: Path) -> Iterator[Callable[[], Pair]]:
    """Neighbours go to different halves."""
    yield lambda: plain("hub_phimoe__hf5", "phimoe", phimoe())
    yield lambda: plain("hub_minimax_m2__hf5", "minimax", minimax())
    yield lambda: plain("hub_nomic_bert__hf5", "nomic", nomic())
    yield lambda: plain("hub_gte__hf5", "gte", gte())
    yield lambda: plain("hub_jamba__hf5", "jamba", jamba())
    yield lambda: plain("hub_lfm2_moe__hf5", "lfm", lfm())
    yield lambda: plain("hub_videomae__hf5", "videomae", videomae())
    yield lambda: plain("hub_granitemoe__hf5", "granite", granite())
    yield lambda: plain("hub_detr__hf5", "detr", detr())
    yield lambda: plain("hub_conditional_detr__hf5", "conditional", conditional())
    yield lambda: plain("hf_bart__ct2", "bart", ct_bart())
    yield lambda: plain("hf_mbart__ct2", "mbart", ct_bart(2, 3, True))
    yield lambda: plain("hf_t5_gated__ct2", "t5", ct_t5())
    yield lambda: plain("hf_opt__ct2", "opt", ct_opt())
    yield lambda: plain("hf_mpt__ct2", "mpt", ct_mpt())
    yield lambda: plain("hf_distilbert__ct2", "distilbert", ct_distilbert())
    yield lambda: plain("hf_gemma2__gguf", "gemma", gguf_gemma())
    yield lambda: plain("hf_starcoder2__gguf", "starcoder", gguf_starcoder())
    yield lambda: plain("hf_mamba__gguf", "mamba", gguf_mamba())
    yield lambda: plain("hf_t5__gguf", "t5", gguf_t5())
    yield lambda: plain("hf_phi__litgpt", "phi", lit_phi(packages))
    yield lambda: plain("hf_olmo2__litgpt", "olmo", lit_olmo(packages))
    yield lambda: plain("hf_t5_encoder__torchtune", "t5", tune_t5(packages))
    yield lambda: plain("hf_clip__torchtune_text", "clip", tune_clip(packages))
    yield lambda: plain("hf_albert__curated", "albert", curated_albert())
    yield lambda: plain("hf_falcon__curated", "falcon", curated_falcon())
    yield lambda: plain("hf_mpt__curated", "mpt", curated_mpt())
    yield lambda: plain("hf_electra__curated", "electra", curated_electra())
    yield lambda: plain("openai_clip__timm_visual", "clip", openai_clip())
    yield lambda: plain("big_vision_siglip__open_clip", "siglip", big_vision())
    yield lambda: plain("tv_regnet__timm", "regnet", regnet())
    yield lambda: plain("bit_npz__timm", "bit", bit())
    yield lambda: plain("davit__timm", "davit", davit())
    yield lambda: plain("mvitv2__timm", "mvit", mvit())
    yield lambda: plain("poolformer__timm", "poolformer", poolformer())
    yield lambda: plain("pvt_v2__timm", "pvt", pvt())
    yield lambda: plain("resmlp__timm", "resmlp", resmlp())
    yield lambda: plain("beit3__timm", "beit", beit())
    yield lambda: plain("hf_bart__keras", "bart", keras_bart())
    yield lambda: plain("hf_distilbert__keras", "distilbert", keras_distilbert())
    yield lambda: plain("hf_gemma__keras", "gemma", keras_gemma())
    yield lambda: plain("hf_esm__keras", "esm", keras_esm())
    # Other depths.
    yield lambda: deeper("hub_nomic_bert_4__hf5_6", "nomic", nomic(4), nomic(6))
    yield lambda: deeper("hub_gte_6__hf5_4", "gte", gte(6), gte(4))
    yield lambda: deeper("hf_opt_5__ct2_3", "opt", ct_opt(5), ct_opt(3))
    yield lambda: deeper("hf_mpt_3__ct2_5", "mpt", ct_mpt(3), ct_mpt(5))
    yield lambda: deeper("hf_bart_2_2__ct2_4_4", "bart", ct_bart(2, 2), ct_bart(4, 4))
    yield lambda: deeper("hf_mbart_4_2__ct2_2_4", "mbart", ct_bart(4, 2, True), ct_bart(2, 4, True))
    yield lambda: deeper("openai_clip_4__timm_visual_8", "clip", openai_clip(4), openai_clip(8))
    yield lambda: deeper("beit3_8__timm_5", "beit", beit(8), beit(5))
    yield lambda: deeper("hf_gemma2_3__gguf_7", "gemma", gguf_gemma(3), gguf_gemma(7))
    yield lambda: deeper("hf_distilbert_6__keras_2", "distilbert", keras_distilbert(6), keras_distilbert(2))
    # Parts, and nothing at all.
    yield lambda: partial(
        "hf_bart_encoder__ct2", "bart", ct_bart(), lambda k: ".decoder." not in k and "lm_head" not in k
    )
    yield lambda: partial("hf_mbart_no_cross__ct2", "mbart", ct_bart(2, 3, True), lambda k: "encoder_attn" not in k)
    yield lambda: partial(
        "hub_phimoe_dense__hf5",
        "phimoe",
        phimoe(),
        lambda k: "block_sparse_moe" not in k,
        {
            f"model.layers.{i}.mlp.{m}.weight": s
            for i in range(4)
            for m, s in (("gate_proj", (96, 32)), ("up_proj", (96, 32)), ("down_proj", (32, 96)))
        },
    )
    yield lambda: partial("big_vision_text__open_clip", "siglip", big_vision(), lambda k: "/img/" not in k)
    yield lambda: partial("openai_clip_text__timm_visual", "clip", openai_clip(), lambda k: not k.startswith("visual."))
    yield lambda: partial(
        "hf_clip_vision__torchtune_text", "clip", tune_clip(packages), lambda k: k.startswith("vision_model")
    )
    yield lambda: partial("hub_detr_backbone__hf5", "detr", detr(), lambda k: "conv_encoder" in k)
    yield lambda: partial("hf_t5_decoder__gguf", "t5", gguf_t5(), lambda k: "decoder" in k or k == "lm_head.weight")
    yield lambda: negative("hf_mamba__ct2_opt", "mamba", gguf_mamba(), ct_opt())
    yield lambda: negative("tv_regnet__hf5_gte", "regnet", regnet(), gte())
    yield lambda: negative("poolformer__gguf_gemma2", "poolformer", poolformer(), gguf_gemma())
    yield lambda: negative("bit__timm_beit", "bit", bit(), beit())
