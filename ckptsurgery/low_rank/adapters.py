"""Low-rank adapters.

cs.adapters.merge(base, adapter, ...)     the plan of a base with adapters merged into it
cs.adapters.extract(base, tuned, path)    the difference of two models as an adapter
"""

from __future__ import annotations

from .extracting import Extraction, extract
from .into_base import merge

__all__ = ["Extraction", "extract", "merge"]
