"""Small configs of transformers models: the defaults of a type, with sizes that fit each other by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

__all__ = ["config_makers", "small_config"]

# The first pattern that a field's whole name matches decides. Sizes divide each other, and heads fit into hidden sizes.
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*(vocab_size|num_embeddings|vocab_size_or_config_json_file)", 96),
    (r".*num_(key_value|kv)_heads|.*n_kv_heads", 2),
    (r".*(num_attention_heads|n_heads?|num_heads|attention_heads|num_query_heads|attn_heads)", 4),
    (r".*(num_(hidden_)?layers|n_layers?|(encoder|decoder)_layers|num_blocks|depth|num_hidden_groups)", 2),
    (r".*(num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts)", 4),
    (r".*(num_experts_per_tok|moe_k|moe_topk|top_k_experts|num_selected_experts)", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|first_k_dense_replace", 1),
    (r".*(moe_intermediate_size|expert_intermediate_size|shared_expert_intermediate_size)", 24),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|dim_feedforward|ffn_embed_dim|mlp_dim)", 48),
    (r".*(q_lora_rank|kv_lora_rank|lora_rank)", 16),
    (r".*(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|qk_head_dim)", 8),
    (r".*head_dim|.*head_size|d_kv", 8),
    (r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|projection_dim|dim|width|n_embed)", 32),
    (r".*max_position_embeddings|n_positions|.*max_(source|target)_positions|n_ctx", 64),
    (r"image_size|img_size", 32),
    (r"patch_size", 8),
    (r".*(num_queries|num_query_tokens|num_latents)", 6),
)
# What stands in for a field that a model needs and that has no default.
_NEEDED: tuple[tuple[str, Any], ...] = (
    (r"mlp_layer_types", ["dense", "sparse"]),
    (r"layer_types", ["full_attention", "full_attention"]),
    (r".*vocabulary_map", {}),
    (r".*kernel_sizes", [1, 1]),
    (r".*_channels", [32, 32]),
    (r"indexer_.*", 8),
    (r"(?!.*lora).*(size|heads|dim|experts|per_tok|layers)", 8),
)
_TOKEN = re.compile(r".*_token_(id|index)")
_LAST_TOKEN = 90  # below the small vocabulary


def config_makers(kind: Any, fields: Mapping[str, Any] | None = None) -> Iterator[Callable[[], Any]]:
    """Yield ways to make a config of a class, the plainest first: not every class can be built from its defaults.

    Args:
        fields: fields of the small ones that have a value of their own.
    """
    yield kind
    yield partial(small_config, kind, fields=fields)
    yield partial(small_config, kind, filled=True, fields=fields)
    yield partial(small_config, kind, filled=True, backbone=True, fields=fields)


def small_config(
    kind: Any, *, filled: bool = False, backbone: bool = False, fields: Mapping[str, Any] | None = None
) -> Any:
    """Return a small config of a class.

    Args:
        kind: a config class of the library.
        filled: put values where there are none by default.
        backbone: a backbone of the library's own in the place of one from another package.
        fields: fields that have a value of their own; those of a part in a table.
    """
    fields = _merged(_fields(kind(), filled), {} if fields is None else fields)
    if filled and hasattr(kind(), "out_indices"):
        fields |= {"out_indices": [0, 1, 2, 3], "num_hidden_layers": 4}
    if backbone:
        fields |= {name: 8 for name in fields if name.endswith("attention_heads")}  # maps of all heads are normed by 8
        fields = {k: v for k, v in fields.items() if not k.startswith("backbone")}
        fields |= {"backbone_config": _own_backbone(), "use_timm_backbone": False, "backbone": None}
        known = kind().to_dict()
        fields = {k: v for k, v in fields.items() if k in known or k == "backbone_config"}
    return kind(**fields)


def _merged(fields: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with others over them, table by table."""
    found = dict(fields)
    for name, value in more.items():
        inner = found.get(name)
        found[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return found


def _own_backbone() -> Any:
    """The config of the first backbone with convolutions that the library holds itself."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES as NAMES

    known: Mapping[str, Any] = transformers.CONFIG_MAPPING
    for name in sorted(NAMES):
        made = known[name]()
        if hasattr(made, "layer_type") and hasattr(made, "hidden_sizes"):
            return known[name](out_features=made.stage_names[1:])
    raise LookupError("the library has no backbone of its own")


def _fields(config: Any, filled: bool = False) -> dict[str, Any]:
    """The fields that are to be smaller, those of a config's parts included; needed ones that have no default."""
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        # Some fields differ by layer, and the library refuses to read them as one; parts of a config do not.
        part: Any = getattr(config, name, None) if isinstance(value, dict) else None
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):
            found[name] = {**_fields(part, filled), "model_type": part.model_type}
        elif value is None and filled:
            needed = next((one for pattern, one in _NEEDED if re.fullmatch(pattern, name)), None)
            if needed is not None:
                found[name] = needed
        elif _TOKEN.fullmatch(name):
            ids = value if isinstance(value, list) else [value]
            if any(isinstance(one, int) and one > _LAST_TOKEN for one in ids):
                found[name] = [_LAST_TOKEN] if isinstance(value, list) else _LAST_TOKEN
        elif value is None or (isinstance(value, int) and not isinstance(value, bool)):
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
            if size is not None and (value > size if value is not None else name in ("vocab_size", "image_size")):
                found[name] = size
    layers = found.get("num_hidden_layers")
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(type(config), name, None), property):
            continue  # computed from other fields
        kinds = getattr(config, name, None)
        if layers and isinstance(kinds, list):
            different = list(dict.fromkeys(kinds))[:layers]
            found[name] = different + [kinds[-1]] * (layers - len(different))
    return found
