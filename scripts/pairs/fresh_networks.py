"""Networks of families that neither the corpus nor the two halves know: diffusion, detection, time series, medical."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from engine_networks import ctranslate, gguf_names
from hub_networks import _resnet
from keras_networks import keras_net
from networks import GROUPED, TINY, hub, shapes
from pairing import Network, Numbers
from torch import nn
from vision_networks import filtered

Table = Mapping[str, str]


def deformable(layers: int = 2) -> Network:
    sizes = {"encoder_layers": layers, "decoder_layers": layers, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    config = hf.DeformableDetrConfig(
        d_model=32,
        **sizes,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=10,
        num_feature_levels=2,
        backbone_config=_resnet("stage3", "stage4"),
    )
    return hub(hf.DeformableDetrForObjectDetection(config))


def maskformer(layers: int = 2) -> Network:
    backbone = hf.SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[2, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    decoder = hf.DetrConfig(
        d_model=32, decoder_layers=layers, encoder_layers=1, decoder_ffn_dim=96, decoder_attention_heads=4,
        encoder_ffn_dim=96, encoder_attention_heads=4, num_queries=10, use_timm_backbone=False, backbone=None,
        use_pretrained_backbone=False, backbone_config=_resnet("stage4"),
    )  # fmt: skip
    config = hf.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=backbone, decoder_config=decoder
    )
    return hub(hf.MaskFormerForInstanceSegmentation(config))


def nemotron_h() -> Network:
    config = hf.NemotronHConfig(
        **{**GROUPED, "num_hidden_layers": 4},
        layers_block_type=["mamba", "moe", "attention", "moe"],
        ssm_state_size=4,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        head_dim=8,
        n_routed_experts=3,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
    )
    return hub(hf.NemotronHForCausalLM(config))


def jina(layers: int = 3) -> Network:
    config = hf.JinaEmbeddingsV3Config(**{**TINY, "num_hidden_layers": layers}, max_position_embeddings=20)
    return hub(hf.JinaEmbeddingsV3ForMaskedLM(config))


def timesfm(layers: int = 3) -> Network:
    config = hf.TimesFm2_5Config(**{**GROUPED, "num_hidden_layers": layers}, head_dim=8)
    return hub(hf.TimesFm2_5ModelForPrediction(config))


def gguf_bloom(layers: int = 3) -> Network:
    config = hf.BloomConfig(hidden_size=32, n_layer=layers, n_head=4, vocab_size=53)
    return gguf_names(hf.BloomForCausalLM(config), "BLOOM", layers)


def gguf_modernbert(layers: int = 4) -> Network:
    config = hf.ModernBertConfig(**{**TINY, "num_hidden_layers": layers}, cls_token_id=3, sep_token_id=4)
    return gguf_names(hf.ModernBertModel(config), "MODERN_BERT", layers)


def gguf_olmoe(layers: int = 3) -> Network:
    config = hf.OlmoeConfig(**{**GROUPED, "num_hidden_layers": layers}, num_experts=4)
    return gguf_names(hf.OlmoeForCausalLM(config), "OLMOE", layers)


def gguf_cohere(layers: int = 3) -> Network:
    config = hf.CohereConfig(**{**GROUPED, "num_hidden_layers": layers}, use_qk_norm=True)
    return gguf_names(hf.CohereForCausalLM(config), "COMMAND_R", layers)


def ct_bigcode(layers: int = 3) -> Network:
    config = hf.GPTBigCodeConfig(
        n_embd=32, n_layer=layers, n_head=4, n_positions=20, vocab_size=53, bos_token_id=1, eos_token_id=2
    )
    return ctranslate(hf.GPTBigCodeForCausalLM(config), "GPTBigCodeMHALoader")


def ct_roberta(layers: int = 3) -> Network:
    config = hf.RobertaConfig(**{**TINY, "num_hidden_layers": layers}, max_position_embeddings=20)
    config.position_embedding_type = "absolute"
    return ctranslate(hf.RobertaModel(config), "RobertaLoader")


def keras_dino(layers: int = 3) -> Network:
    config = hf.Dinov2Config(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, mlp_ratio=3, image_size=32, patch_size=8
    )
    model = hf.Dinov2Model(config)
    return Network(hub(model).source, keras_net(model, "convert_dinov2", "DINOV2Backbone").convert)


def renamed_back(shapes_of: Mapping[str, tuple[int, ...]], table: Table) -> dict[str, str]:
    """Target key -> the source key that a table of texts, applied in its order, turns into it."""
    found = {}
    for key in shapes_of:
        text = key
        for old, new in reversed(table.items()):
            text = text.replace(new, old)
        found[key] = text
    return found


def wan(layers: int = 3) -> Network:
    """A video transformer, whose source names are the table's own."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers as convert

    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
        ffn_dim=96, num_layers=layers, cross_attn_norm=True,
    )  # fmt: skip
    table = {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "cross_attn": "attn2",
        "self_attn": "attn1",
        ".o.": ".to_out.0.",
        ".q.": ".to_q.",
        ".k.": ".to_k.",
        ".v.": ".to_v.",
        "head.head": "proj_out",
        "modulation": "scale_shift_table",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "norm2": "norm__placeholder",
        "norm3": "norm2",
        "norm__placeholder": "norm3",
    }
    wanted = shapes(model.state_dict())
    names = renamed_back(wanted, table)
    names["scale_shift_table"] = "head.modulation"
    source = {names[k]: s for k, s in wanted.items()}
    if set(convert(dict.fromkeys(source, torch.zeros(2)))) != set(wanted):
        raise ValueError("the table does not give the model")
    return Network(source, lambda given: convert(dict(given)))


def flux(double: int = 2, single: int = 2) -> Network:
    """An image transformer of two stacks; its converter knows one width, which is cut here."""
    import diffusers.loaders.single_file_utils as library

    d, names = 32, {}

    def linear(at: str, rows: int, columns: int) -> None:
        names[at + ".weight"], names[at + ".bias"] = (rows, columns), (rows,)

    linear("img_in", d, 16)
    for at, width in (("time_in", 16), ("vector_in", 24), ("guidance_in", 16)):
        linear(at + ".in_layer", d, width)
        linear(at + ".out_layer", d, d)
    linear("txt_in", d, 40)
    for i in range(double):
        for tower in ("img", "txt"):
            at = f"double_blocks.{i}.{tower}"
            linear(at + "_mod.lin", 6 * d, d)
            linear(at + "_attn.qkv", 3 * d, d)
            names[at + "_attn.norm.query_norm.scale"] = names[at + "_attn.norm.key_norm.scale"] = (8,)
            linear(at + "_attn.proj", d, d)
            linear(at + "_mlp.0", 4 * d, d)
            linear(at + "_mlp.2", d, 4 * d)
    for i in range(single):
        at = f"single_blocks.{i}."
        linear(at + "linear1", 7 * d, d)
        linear(at + "linear2", d, 5 * d)
        names[at + "norm.query_norm.scale"] = names[at + "norm.key_norm.scale"] = (8,)
        linear(at + "modulation.lin", 3 * d, d)
    linear("final_layer.linear", 16, d)
    linear("final_layer.adaLN_modulation.1", 2 * d, d)
    return Network(names, lambda given: _at_width(library, dict(given), d))


def _at_width(library: Any, given: Numbers, width: int) -> Numbers:
    real = torch.split

    def split(tensor: torch.Tensor, sizes: Any, dim: int = 0) -> Any:
        return real(tensor, [n * width // 3072 for n in sizes], dim)

    torch.split = split  # type: ignore[assignment]
    try:
        made: Numbers = library.convert_flux_transformer_checkpoint_to_diffusers(given)
    finally:
        torch.split = real
    return made


def ldm_unet() -> Network:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_ldm_unet_checkpoint

    model = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=24, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    whole = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]
    within = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
              "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip

    def original(key: str) -> str:
        if key in whole:
            return "model.diffusion_model." + whole[key]
        found = re.match(r"(down|mid|up)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.*)", key)
        if found is None:
            raise ValueError(key)
        where, block, kind, layer = found[1], int(found[2] or 0), found[3], int(found[4])
        rest = found[5]
        if kind == "resnets":
            rest = re.sub(r"^\w+", lambda m: within[m[0]], rest)
        if where == "mid":
            return f"model.diffusion_model.middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
        if where == "down":
            place = f"input_blocks.{block * 3 + 1 + (2 if kind == 'downsamplers' else layer)}"
            inner = {"resnets": "0.", "attentions": "1."}.get(kind, "0.op.")
            return f"model.diffusion_model.{place}.{inner}{rest.removeprefix('conv.') if 'op' in inner else rest}"
        place = f"output_blocks.{block * 3 + (2 if kind == 'upsamplers' else layer)}"
        inner = {"resnets": "0.", "attentions": "1."}.get(kind, "1." if block == 0 else "2.")
        return f"model.diffusion_model.{place}.{inner}{rest}"

    wanted = shapes(model.state_dict())
    source = {original(k): s for k, s in wanted.items()}
    config = {"layers_per_block": 2}
    made = convert_ldm_unet_checkpoint(dict.fromkeys(source, torch.zeros(2)), config)
    if set(made) != set(wanted):
        raise ValueError(f"the original names do not give the model: {sorted(set(made) ^ set(wanted))[:4]}")
    return Network(source, lambda given: convert_ldm_unet_checkpoint(dict(given), config))


def loaded(model: nn.Module, original: Callable[[str], str]) -> Network:
    """A library that loads the files of its older version."""
    wanted = shapes(model.state_dict())

    def convert(given: Numbers) -> Numbers:
        twin = model.double()
        twin.load_old_state_dict(dict(given))  # type: ignore[operator]
        return {k: t.detach().clone() for k, t in twin.state_dict().items() if k in wanted}

    return Network({original(k): s for k, s in wanted.items()}, convert)


def monai_unet() -> Network:
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    model = DiffusionModelUNet(
        spatial_dims=3, in_channels=1, out_channels=1, channels=(16, 32), attention_levels=(False, True),
        num_res_blocks=1, norm_num_groups=8, num_head_channels=8, with_conditioning=True, cross_attention_dim=24,
        transformer_num_layers=1,
    )  # fmt: skip

    def original(key: str) -> str:
        if "transformer_blocks" in key:
            return key.replace(".out_proj.", ".to_out.0.")
        key = re.sub(r"\.attn\.out_proj\.", ".proj_attn.", key)
        return re.sub(r"\.attn\.(to_[qkv])\.", r".\1.", key).replace("postconv", "conv")

    return loaded(model, original)


def monai_decoder(layers: int = 3) -> Network:
    """The renames that `load_old_state_dict` describes: norm2 is the cross-attention's, norm3 the feed-forward's."""
    from monai.networks.nets.transformer import DecoderOnlyTransformer

    found = shapes(DecoderOnlyTransformer(53, 20, 32, layers, 4, with_cross_attention=True).state_dict())
    old = {k: k.replace("norm2", "norm3").replace("norm_cross_attn", "norm2") for k in found}
    return Network({old[k]: s for k, s in found.items()}, lambda given: {k: given[old[k]] for k in found})


def focalnet() -> Network:
    import timm.models.focalnet as library

    model = library.FocalNet(embed_dim=16, depths=(1, 1, 2, 1), num_classes=10, layerscale_value=1e-4)

    def original(key: str) -> str:
        key = re.sub(r"^stem\.", "patch_embed.", key)
        key = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        key = key.replace("head.fc", "head")
        return re.sub(r"\bls(\d)\.gamma", r"gamma_\1", key)

    wanted = shapes(model.state_dict())
    source = {original(k): s for k, s in wanted.items()}
    return Network(source, lambda given: library.checkpoint_filter_fn(dict(given), model.double()))


def xcit(layers: int = 3) -> Network:
    import timm.models.xcit as library

    model = library.Xcit(
        img_size=32, patch_size=8, embed_dim=32, depth=layers, num_heads=4, num_classes=10, mlp_ratio=3
    )
    wanted = shapes(model.state_dict())
    source: dict[str, tuple[int, ...]] = {}
    for key, shape in wanted.items():
        name = re.sub(r"(cls_attn_blocks\.\d+\.attn\.)q\.", r"\1qkv.", key.replace("pos_embed.", "pos_embeder."))
        if not re.search(r"cls_attn_blocks\.\d+\.attn\.[kv]\.", name):
            source[name] = (3 * shape[0], *shape[1:]) if name != key and "qkv" in name else shape
    return Network(source, lambda given: library.checkpoint_filter_fn(dict(given), model))


def hiera() -> Network:
    import timm.models.hiera as library

    model = library.Hiera(img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 2, 2, 1), num_classes=10)
    return filtered(
        model,
        lambda k: re.sub(r"^head\.norm", "norm", k.replace("head.fc", "head.projection")),
        lambda given, net: library.checkpoint_filter_fn(given, net),
    )
