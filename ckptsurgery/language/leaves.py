"""Values that are given by the last part of a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import Diagnostic, LoadError
from .folding import fold

__all__ = ["by_leaf"]


def by_leaf(names: Iterable[str], what: Any) -> dict[str, Any]:
    """Give each name its value: the same for all, or the one for the last part of the name.

    >>> by_leaf(["0.weight", "0.bias"], {"weight": "normal(std=0.01)", "bias": "zeros"})
    {'0.weight': 'normal(std=0.01)', '0.bias': 'zeros'}

    Raises:
        LoadError: a mapping leaves a name out, or has a part that no name ends in.
    """
    if not isinstance(what, Mapping):
        return dict.fromkeys(names, what)
    leaves = {name: name.rpartition(".")[2] for name in names}
    problems = []
    left = [name for name, leaf in leaves.items() if leaf not in what]
    if left:
        more = "".join(f', "{leaf}": "zeros"' for leaf in dict.fromkeys(leaves[name] for name in left))
        problems.append(
            Diagnostic(
                "not-initialised",
                f"{len(left)} of the selected tensors end in nothing that {sorted(what)} names",
                notes=tuple(text for text, _ in fold(left)),
                help=f"add{more[1:]}, or select less",
            )
        )
    ends = ", ".join(dict.fromkeys(leaves.values()))
    problems += [
        Diagnostic("nothing-selected", f"no selected name ends in {leaf!r}", facts=(("they end in", ends),))
        for leaf in what
        if leaf not in leaves.values()
    ]
    if problems and leaves:
        raise LoadError(problems)
    return {name: what[leaf] for name, leaf in leaves.items()}
