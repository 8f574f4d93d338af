"""Tiny random transformers models of any type: the defaults of its config, shrunk by the names of their fields."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ckptsurgery.exchange.small_configs import config_makers

__all__ = ["build", "classes_of", "config_makers"]


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


def build(model_type: str, wanted: type[PreTrainedModel] | None = None, seed: int = 0) -> PreTrainedModel:
    """A tiny model with random weights; the class with a head where the type has one."""
    import ckptsurgery.exchange.transformers_models as importing

    kind: Any = transformers.CONFIG_MAPPING[model_type]
    kinds = [wanted] if wanted is not None else [getattr(transformers, name) for name in classes_of(model_type)]
    kinds += [one for one in importing._own_classes(kind) if wanted is None and one not in kinds]
    errors: list[Exception] = []
    for make in list(config_makers(kind))[1:]:
        for one in kinds:
            try:
                torch.manual_seed(seed)
                model: PreTrainedModel = one._from_config(make())
                return model
            except Exception as error:  # one class of several may not be built from this config
                errors.append(error)
    raise errors[0]
