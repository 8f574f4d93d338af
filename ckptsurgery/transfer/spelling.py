"""Other names for the same tensor: what PyTorch itself renamed, and the two spellings of a norm's scale and shift.

A spelling is used only when the target shows it: the other name exists there, with this shape, and nothing else
fills it. Names are compared by whole segments, so a `weight_gate` is never taken for a `weight_g`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from ..specs import TensorSpec

__all__ = ["respelled"]

_LEAVES = (
    (("weight_g",), ("parametrizations", "weight", "original0")),
    (("weight_v",), ("parametrizations", "weight", "original1")),
    (("weight_orig",), ("parametrizations", "weight", "original")),
    (("gamma",), ("weight",)),
    (("beta",), ("bias",)),
)


def respelled(
    unmatched: Mapping[str, TensorSpec], free: Mapping[str, TensorSpec], taken: Collection[str] = ()
) -> dict[str, str]:
    """Keys that are in the target under another spelling.

    >>> spec = TensorSpec([4], "F32")
    >>> respelled({"norm.gamma": spec, "norm.gammas": spec}, {"norm.weight": spec})
    {'norm.gamma': 'norm.weight'}

    Args:
        unmatched: keys as the target would have them, that it does not have.
        free: the target's keys that nothing fills so far.
        taken: target keys that are out of bounds.
    """
    found: dict[str, str] = {}
    used: set[str] = set(taken)
    for key, spec in unmatched.items():
        for other in _spellings(key):
            if other in free and other not in used and free[other].shape == spec.shape:
                found[key] = other
                used.add(other)
                break
    return found


def _spellings(key: str) -> Iterator[str]:
    segments = tuple(key.split("."))
    for one, other in (*_LEAVES, *((b, a) for a, b in _LEAVES)):
        if segments[-len(one) :] == one:
            yield ".".join((*segments[: -len(one)], *other))
