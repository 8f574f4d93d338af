"""Networks of transformers, in the hub's layouts and the library's."""

from __future__ import annotations

from typing import Any

import transformers as hf
from networks import GROUPED, TINY, hub
from pairing import Network


def jamba(layers: int = 4) -> Network:
    return hub(
        hf.JambaForCausalLM(
            hf.JambaConfig(
                **{**GROUPED, "num_hidden_layers": layers},
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
    return hub(hf.PhimoeForCausalLM(hf.PhimoeConfig(**{**GROUPED, "num_hidden_layers": layers}, num_local_experts=4)))


def nomic(layers: int = 3) -> Network:
    return hub(hf.NomicBertModel(hf.NomicBertConfig(**{**TINY, "num_hidden_layers": layers})))


def gte(layers: int = 3) -> Network:
    return hub(hf.GteModel(hf.GteConfig(**{**TINY, "num_hidden_layers": layers})))


def lfm(layers: int = 3) -> Network:
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    return hub(
        hf.Lfm2MoeForCausalLM(
            hf.Lfm2MoeConfig(
                **{**GROUPED, "num_hidden_layers": layers},
                num_experts=3,
                moe_intermediate_size=24,
                num_dense_layers=1,
                layer_types=kinds[:layers],
            )
        )
    )


def granite(layers: int = 3) -> Network:
    config = hf.GraniteMoeConfig(**{**GROUPED, "num_hidden_layers": layers}, num_local_experts=3)
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


def conditional(layers: int = 2) -> Network:
    config = hf.ConditionalDetrConfig(**_detection(layers), backbone_config=_resnet("stage4"))
    return hub(hf.ConditionalDetrForObjectDetection(config))


def minimax(layers: int = 3) -> Network:
    config = hf.MiniMaxM2Config(**{**GROUPED, "num_hidden_layers": layers}, num_local_experts=3, head_dim=8)
    return hub(hf.MiniMaxM2ForCausalLM(config))
