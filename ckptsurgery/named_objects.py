"""Objects that a text names: `module:path`."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

__all__ = ["names_object", "object_at"]

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def names_object(text: str) -> bool:
    """Return whether a text has the form `module:path`.

    >>> names_object("os.path:join"), names_object("a.json")
    (True, False)
    """
    return _NAME.fullmatch(text) is not None


def object_at(place: str) -> Any:
    """Import the object at `module:path`; a module in the working directory is found too.

    >>> object_at("os.path:join").__name__
    'join'

    Raises:
        ImportError, AttributeError: there is no such module, or nothing of that name in it.
    """
    module, _, path = place.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found
