"""Layouts on disk that a model's own library converts while it loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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
    return None, []
