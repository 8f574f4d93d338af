"""Low-rank adapters.

cs.adapters.merge(base, adapter, ...)     the plan of a base with adapters merged into it
"""

from __future__ import annotations

from .merging import merge

__all__ = ["merge"]
