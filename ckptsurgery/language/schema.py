"""The JSON schema of recipe files, and the version of the language that it describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["LANGUAGE_VERSION", "recipe_schema"]

LANGUAGE_VERSION = "1.0"
"""The version of Keyaxis, as the specification has it. Files of `schema = 1` are of every version 1.x."""


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipe files (draft 2020-12).

    >>> recipe_schema()["title"]
    'Keyaxis 1.0 recipe'
    """
    text = (Path(__file__).parent / "recipe.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
