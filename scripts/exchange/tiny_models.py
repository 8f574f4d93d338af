"""Tiny random transformers models of any type: the defaults of its config, shrunk by the names of their fields."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ckptsurgery.exchange.small_configs import config_makers
from ckptsurgery.exchange.transformers_models import classes_of

__all__ = ["build"]

# Fields of a type, or of one class, that depend on each other in ways that their names do not show.
FIELDS: dict[str, dict[str, Any]] = {
    "mimi": {"upsample_groups": 8},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "NemotronH_Omni_Reasoning_V3": {"vision_config": {"video_temporal_patch_size": 2}},
    "cosmos3_edge": {"text_config": {"head_dim": 128}},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}, "audio_config": {"adapter_input_size": 32}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"vq_config": {"base_channels": 32, "codebook_size": 64}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "glm5_next_text": {"num_key_value_heads": 4},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 16}}
    },
    "mimi_decoder": {"upsample_groups": 8},
    "gradium_phonon_tts": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}},
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {"num_key_value_heads": 4},
            "diarization_config": {"audio_config": {"num_key_value_heads": 4}},
        },
        "word_timestamp_config": {"num_key_value_heads": 4},
    },
    "Sapiens2ForPointmapEstimation": {
        "head_config": {
            "upsample_out_channels": [16, 8],
            "conv_out_channels": [8],
            "scale_conv_out_channels": [16, 8],
            "scale_final_hidden_sizes": [8, 8],
        }
    },
}
DEFAULTS = ("d_fine", "rt_detr_v2")
"""Types whose parts only fit each other at their own sizes, which are small."""


def build(model_type: str, wanted: type[PreTrainedModel] | None = None, seed: int = 0) -> PreTrainedModel:
    """A tiny model with random weights; the class with a head where the type has one."""
    kind: Any = transformers.CONFIG_MAPPING[model_type] if wanted is None else wanted.config_class
    kinds = [wanted] if wanted is not None else classes_of(model_type)
    errors: list[Exception] = []
    fields = FIELDS.get(wanted.__name__ if wanted is not None else model_type, FIELDS.get(model_type))
    for make in list(config_makers(kind, fields))[model_type not in DEFAULTS :]:
        for one in kinds:
            try:
                torch.manual_seed(seed)
                model: PreTrainedModel = one._from_config(make())
                return model
            except Exception as error:  # one class of several may not be built from this config
                errors.append(error)
    raise errors[0]
