"""Low-rank adapters.

cs.adapters.merge(base, adapter, ...)     the plan of a base with adapters merged into it
"""

from __future__ import annotations

from .into_base import merge

__all__ = ["merge"]
