"""Layouts on disk that a model's own library converts while it loads."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from ..language.recipe import Recipe
from ..specs import TensorSpec

if TYPE_CHECKING:
    from torch import nn

__all__ = ["layout_on_disk"]


def layout_on_disk(
    model: nn.Module, source: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]
) -> tuple[Recipe | None, list[str]]:
    """Return the recipe from the files of a model's library to the model, where a source is in that layout.

    Args:
        source: what the source holds. wanted: what the model holds; a source with all of it is in the model's layout.
    """
    library: Any = sys.modules.get("transformers.modeling_utils")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None, []
    from .transformers_models import recipe_of_model

    try:
        recipe = recipe_of_model(model, sized=True)
    except (RecipeError, ImportError):
        return None, []
    if not (recipe.rules or recipe.stages):
        return None, []
    if wanted.keys() <= source.keys():
        return None, []
    return recipe, ["the source is in the layout of transformers' files: read by the library's conversion table"]
