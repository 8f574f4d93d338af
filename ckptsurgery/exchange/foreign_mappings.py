"""What a name or a file of another framework's mapping is, and the recipe that it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import Diagnostic, RecipeError, Remedy
from ..language.recipe import Recipe
from ..named_objects import names_object, object_at
from .mergekit import recipe_from_mergekit
from .tracing import trace
from .transformers_models import from_transformers

__all__ = ["import_mapping"]


def import_mapping(what: str, specs: Any = None) -> Recipe:
    """Return the recipe for a mapping of another framework.

    Args:
        what: `transformers:TYPE` for a model type of the transformers library; `module:function` for a function over
            state dicts, which is traced; a `.yml` file of mergekit.
        specs: what the function takes: a small checkpoint of its layout.

    Raises:
        RecipeError: it is neither, or cannot be put into rules.
    """
    library, _, name = what.partition(":")
    if library == "transformers" and name:
        return from_transformers(name)
    if Path(what).suffix in (".yml", ".yaml"):
        try:
            return recipe_from_mergekit(Path(what).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(Diagnostic("unknown-mapping", f"{what!r} cannot be read: {error}")) from None
    if names_object(what) and not Path(what).exists():
        if specs is None:
            small = (Remedy("specs", None, "is a small checkpoint of the layout that the function takes"),)
            raise RecipeError(Diagnostic("no-specs", f"{what} is traced on tensors of known shapes", remedies=small))
        return trace(_function(what), specs)
    text = f"{what!r} is not a mapping that can be imported"
    advice = "transformers:TYPE, module:function with the layout that it takes, or merge.yml"
    raise RecipeError(Diagnostic("unknown-mapping", text, advice=advice))


def _function(place: str) -> Any:
    """The function at `module:name`; a module in the working directory is found too."""
    try:
        found = object_at(place)
    except (ImportError, AttributeError) as error:
        raise RecipeError(Diagnostic("unknown-mapping", f"{place} cannot be imported: {error}")) from None
    if not callable(found):
        raise RecipeError(Diagnostic("unknown-mapping", f"{place} is {type(found).__name__}, not a function"))
    return found
