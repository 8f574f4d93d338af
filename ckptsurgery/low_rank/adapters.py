"""Low-rank adapters.

cs.adapters.merge(base, adapter, ...)     the plan of a base with adapters merged into it
cs.adapters.extract(base, tuned, path)    the difference of two models as an adapter
cs.adapters.convert(adapter, base, path, to)   an adapter in the spelling of PEFT, diffusers or kohya
"""

from __future__ import annotations

from .extracting import Extraction, extract
from .into_base import merge
from .respelling import convert

__all__ = ["Extraction", "convert", "extract", "merge"]
