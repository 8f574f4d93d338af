"""The recipe for a source in the model's own layout: prefixes and respellings, no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import Diagnostic, LoadError
from ..language.keys import escape
from ..language.recipe import Recipe, Scope
from ..specs import TensorSpec
from ..wording import counted
from .aligning import Alignment, align
from .deciding import Wishes, named_keys
from .spelling import respelled

__all__ = ["own_layout"]

Specs = Mapping[str, TensorSpec]


def own_layout(source: Specs, target: Specs, drop: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Write the recipe that brings a source's keys to the model's names, and say what it does.

    >>> spec = TensorSpec([2], "F32")
    >>> recipe, notes = own_layout({"module.norm.gamma": spec, "module.norm.bias": spec},
    ...                            {"norm.weight": spec, "norm.bias": spec})
    >>> notes
    ["prefix 'module.' taken off", "1 key in another spelling, such as 'norm.gamma' for 'norm.weight'"]
    >>> str(recipe.rules[0])
    'module.norm.gamma -> norm.weight'

    Args:
        drop: what the caller leaves out, so that it is no evidence for a prefix.

    Raises:
        LoadError: two parts of one side fit the other equally well.
    """
    dropped = named_keys(Wishes(drop=drop), source, {k: (k,) for k in source}, target)
    best, rivals = align({k: s for k, s in source.items() if k not in dropped}, target)
    if rivals:
        raise _ambiguous(best, rivals)
    notes = [str(best)] if best.source or best.target else []
    plain = {k: best.target + k[len(best.source) :] if k.startswith(best.source) else k for k in source}
    # a key that the model has under its own name stays, whatever prefix the others carry
    names = {k: k if k not in best.matched and k in target else n for k, n in plain.items()}
    named = set(names.values())
    free = {k: s for k, s in target.items() if k not in named}
    other = respelled({n: source[k] for k, n in names.items() if n not in target}, free)
    if other:
        one, two = next(iter(other.items()))
        notes.append(f"{len(other)} key{'s' * (len(other) > 1)} in another spelling, such as {one!r} for {two!r}")
    final = {k: other.get(n, n) for k, n in names.items()}
    rules = [f"{escape(k)} -> {escape(n)}" for k, n in final.items() if n != plain[k]]
    if not best.source:
        return Recipe(rules, rest=f"{{k...}} -> {escape(best.target)}{{k...}}" if best.target else "keep"), notes
    inside = Scope(Recipe(rest="keep"), escape(best.source), escape(best.target))
    return Recipe(rules, rest="keep", scopes=[inside]), notes


def _ambiguous(best: Alignment, rivals: Sequence[Alignment]) -> LoadError:
    found = [best, *rivals]
    notes = tuple(
        f"{f.source or f.target or '(no prefix)'}  {counted(len(f.matched), 'key')}, {f.equal} with equal shapes"
        for f in found
    )
    source = [f.source.rstrip(".") for f in found if f.source]
    help = f'subtree="{source[0]}"' if source else "load into the submodule that is meant: load_into(model.part, …)"
    return LoadError(
        Diagnostic(
            "ambiguous-prefix", f"{len(found)} parts fit equally well: which one is meant?", notes=notes, help=help
        )
    )
