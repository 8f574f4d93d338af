"""Networks in the layouts of timm and open_clip."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from networks import shapes
from pairing import Network, Numbers, numbered
from torch import nn


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
