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
    if wanted.keys() <= source.keys():
        return None, []
    from .transformers_models import recipe_of_model

    try:
        part, prefix = _part_on_disk(model, source, library.PreTrainedModel)
        recipe = recipe_of_model(part, sized=True)
    except (RecipeError, ImportError):
        return None, []
    if not (recipe.rules or recipe.stages):
        return None, []
    if prefix:
        recipe = recipe.scoped(source=prefix).replace(rest="keep")
    return recipe, ["the source is in the layout of transformers' files: read by the library's conversion table"]


def _part_on_disk(model: Any, source: Mapping[str, TensorSpec], kind: type) -> tuple[Any, str]:
    """The model whose files a source looks like, and a prefix before its keys.

    The library loads files of a model with a head into the model below it, where the names have its prefix, and files
    of the model below into one with a head.
    """
    own, prefix = _names_on_disk(model), f"{model.base_model_prefix}."
    found = [(len(source.keys() & own), model, "")]
    if found[0][0] < len(own) / 2 and prefix != ".":
        found.append((len(source.keys() & {prefix + name for name in own}), model, prefix))
        base = getattr(model, model.base_model_prefix, None)
        if isinstance(base, kind):
            found.append((len(source.keys() & _names_on_disk(base)), base, ""))
    _, part, before = max(found, key=lambda one: one[0])
    return part, before


def _names_on_disk(model: Any) -> set[str]:
    from .conversion_groups import conversions_of, groups_of

    return {key for group in groups_of(model, conversions_of(model)) for keys in group.files for key in keys}
