"""Where in its block a norm stands, told by its name: before or after attention, before or after the feed-forward."""

from __future__ import annotations

import re
from functools import lru_cache

from .vocabulary import concepts, words

__all__ = ["is_norm", "stage"]

_BEFORE = frozenset(["pre", "input", "before", "first", "in"])
_AFTER = frozenset(["post", "after", "second", "output", "out", "residual"])


@lru_cache(maxsize=65536)
def is_norm(path: str) -> bool:
    """Whether a path's last segments name a norm.

    >>> is_norm("layers.0.ln_1"), is_norm("layers.0.attn.q_proj")
    (True, False)
    """
    return any(c == "norm" for segment in _segments(path)[-2:] for c, _ in concepts(segment))


@lru_cache(maxsize=65536)
def stage(family: str) -> float | None:
    """0 before attention, 1 after it, 2 before the feed-forward, 3 after it; None where the name says nothing.

    The argument is a path with its loops' numbers replaced by `#`.

    >>> [stage("h.#." + n) for n in ("input_layernorm", "post_attention_layernorm", "ffn_norm", "norm2", "ln")]
    [0.0, 1.0, 2.0, 2.0, None]
    """
    last = family.rsplit("#", 1)[-1]
    parts = [w for segment in _segments(last) for w in words(segment)]
    known = {c for segment in _segments(last) for c, _ in concepts(segment)}
    known |= {c for word in parts for c, _ in concepts(word) if c in ("attention", "mlp")}
    before, after = bool(_BEFORE & set(parts)), bool(_AFTER & set(parts))
    attention = "attention" in known and "mlp" not in known
    if "cross" in known:
        return 1.5
    if attention:
        # `attention.output.norm` stands after attention too, but no later norm of attention is ever beside it.
        return 1.0 if after and not before else 0.0
    if "mlp" in known:
        return 3.0 if "post" in parts else 2.0
    if before:
        return 0.0
    if after or "final" in parts:
        return 2.0
    numbers = re.findall(r"\d+", last)
    return 2.0 * (int(numbers[-1]) - 1) if numbers else None


def _segments(path: str) -> list[str]:
    return [s for s in re.split(r"[./]", path) if s]
