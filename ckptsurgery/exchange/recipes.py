"""Recipes: those that ship, those that fit, and those of other frameworks.

cs.recipes.list(), cs.recipes.load("family/name"), cs.recipes.match(source), cs.recipes.route(start, end)
cs.recipes.schema()                          the JSON schema of recipe files
cs.recipes.from_transformers(model_type)     the transformers library's conversion table
cs.recipes.import_mapping("transformers:TYPE")   by the name that the command line takes
cs.recipes.trace(function, specs)            any function over state dicts, run on numbered tensors
"""

from __future__ import annotations

from ..catalog import list_recipes as list
from ..catalog import load_recipe as load
from ..catalog import route
from ..language.schema import recipe_schema as schema
from ..transfer.fitting import match_recipes as match
from .foreign_mappings import import_mapping
from .to_names import to_paddle, to_vllm
from .to_python import to_python, to_state_dict_adapter
from .to_transformers import to_transformers
from .tracing import trace
from .transformers_models import from_transformers, transformers_types

__all__ = [
    "from_transformers",
    "import_mapping",
    "list",
    "load",
    "match",
    "route",
    "schema",
    "to_paddle",
    "to_python",
    "to_state_dict_adapter",
    "to_transformers",
    "to_vllm",
    "trace",
    "transformers_types",
]
