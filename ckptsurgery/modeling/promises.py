"""Whether tensors are what an initialiser promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..errors import Diagnostic, LoadError
from ..language.leaves import by_leaf
from ..ops.base import OpError
from ..ops.moments import Moments, moments
from ..specs import TensorSpec
from .initialising import Whats, read_initialiser
from .statistics import stats_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["promised", "require_drawn"]


def promised(tensors: Mapping[str, Tensor], what: Whats) -> dict[str, Moments]:
    """What an initialiser promises for each tensor.

    Raises:
        LoadError: it promises nothing (`default`, `own`, a callable), or cannot fill the tensor.
    """
    found: dict[str, Moments] = {}
    problems = []
    for name, one in by_leaf(tensors, what).items():
        initialiser = read_initialiser(one)
        try:
            said = moments(initialiser, TensorSpec(tuple(tensors[name].shape), tensors[name].dtype))
        except OpError as error:
            problems.append(Diagnostic("cannot-initialise", f"{name!r}: {error}"))
            continue
        if said is None:
            problems.append(Diagnostic("no-promise", f"{initialiser} says nothing of the mean and the std of {name!r}"))
        else:
            found[name] = said
    if problems:
        raise LoadError(problems)
    return found


def require_drawn(tensors: Mapping[str, Tensor], what: Whats) -> None:
    """Pass if each tensor has the mean, the std and the bounds that the initialiser promises.

    Raises:
        LoadError: some have not; each is listed with what it has and what was promised.
    """
    said = promised(tensors, what)
    problems = [
        Diagnostic(
            "not-as-drawn",
            f"{row.name!r} has mean {row.mean:.4g}, std {row.std:.4g}, within [{row.min:.4g}, {row.max:.4g}]",
            facts=(("promised", str(said[row.name])),),
        )
        for row in stats_of(tensors)
        if not said[row.name].kept_by(asdict(row))
    ]
    if problems:
        raise LoadError(problems)
