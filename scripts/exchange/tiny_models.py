"""Tiny random transformers models of any type: the defaults of its config, shrunk by the names of their fields."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

__all__ = ["build", "classes_of", "shrunk"]

# The first pattern that a field's name matches decides; sizes divide each other, and heads fit into hidden sizes.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*(vocab_size|num_embeddings|vocab_size_or_config_json_file)$", 96),
    (r".*num_(key_value|kv)_heads$|.*n_kv_heads$", 2),
    (r".*(num_attention_heads|n_heads?|num_heads|attention_heads|num_query_heads|attn_heads)$", 4),
    (r".*(num_(hidden_)?layers|n_layers?|(encoder|decoder)_layers|num_blocks|depth|num_hidden_groups)$", 2),
    (r".*(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts)$", 4),
    (r".*(num_experts_per_tok|moe_k|moe_topk|top_k_experts|num_selected_experts)$", 2),
    (r"(n_group|topk_group|num_expert_group|n_shared_experts|first_k_dense_replace)$", 1),
    (r".*(moe_intermediate_size|expert_intermediate_size|shared_expert_intermediate_size)$", 24),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|dim_feedforward|ffn_embed_dim|mlp_dim)$", 48),
    (r".*(q_lora_rank|kv_lora_rank|lora_rank)$", 16),
    (r".*(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|qk_head_dim)$", 8),
    (r".*head_dim$|.*head_size$|d_kv$", 8),
    (r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|projection_dim|dim|width|n_embed)$", 32),
    (r".*max_position_embeddings$|n_positions$|.*max_(source|target)_positions$|n_ctx$", 64),
    (r"(image_size|img_size)$", 32),
    (r"patch_size$", 8),
    (r".*(num_queries|num_query_tokens|num_latents)$", 6),
)
SPECIAL = re.compile(r".*_token_(id|index)$|.*token_id$")


def shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of a config that are to be smaller, those of its parts included."""
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            found[name] = {**shrunk(part), "model_type": part.model_type}
        elif SPECIAL.match(name):
            if isinstance(value, int) and not isinstance(value, bool) and value > 90:
                found[name] = 90
            elif isinstance(value, list) and any(isinstance(v, int) and v > 90 for v in value):
                found[name] = [90]
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((n for pattern, n in SIZES if re.fullmatch(pattern, name)), None)
            if size is not None and value > size:
                found[name] = size
    layers = found.get("num_hidden_layers")
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if layers and isinstance(kinds, list):
            found[name] = list(dict.fromkeys(kinds))[:layers]
            found[name] += [kinds[-1]] * (layers - len(found[name]))
    return found


def classes_of(model_type: str) -> list[str]:
    """The model classes of a type that the library's own tables name, heads first."""
    from transformers.models.auto import modeling_auto as tables

    named: list[str] = []
    for table in (
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
        "MODEL_MAPPING_NAMES",
    ):
        found = getattr(tables, table, {}).get(model_type)
        named += [found] if isinstance(found, str) else list(found or ())
    return list(dict.fromkeys(named))


def build(model_type: str, class_name: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A tiny model with random weights; the class with a head where the type has one."""
    kind = transformers.CONFIG_MAPPING[model_type]
    config = kind(**shrunk(kind()))
    torch.manual_seed(seed)
    names = [class_name] if class_name else classes_of(model_type)
    errors: list[Exception] = []
    for name in names:
        try:
            return getattr(transformers, name)._from_config(config)
        except Exception as error:  # one class of several may not be built from this config
            errors.append(error)
    if errors:
        raise errors[0]
    return AutoModel.from_config(config)
