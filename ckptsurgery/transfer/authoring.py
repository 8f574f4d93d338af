"""The recipe for a source in the model's own layout: prefixes and respellings, no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import Diagnostic, LoadError, Remedy
from ..language.keys import escape
from ..language.recipe import Recipe, Scope
from ..specs import TensorSpec
from ..wording import counted
from .aligning import Alignment, align
from .deciding import Wishes, named_keys
from .spelling import respelled
from .unwrapping import NUMBERS

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
    notes = best.notes
    plain = {k: best.target + k[len(best.source) :] if k.startswith(best.source) else k for k in source}
    # a key that the model has under its own name stays, whatever prefix the others carry
    names = {k: k if k not in best.matched and k in target else best.name(k) for k in source}
    named = set(names.values())
    free = {k: s for k, s in target.items() if k not in named}
    other = respelled({n: source[k] for k, n in names.items() if n not in target}, free)
    if other:
        one, two = next(iter(other.items()))
        notes.append(f"{len(other)} key{'s' * (len(other) > 1)} in another spelling, such as {one!r} for {two!r}")
    final = {k: other.get(n, n) for k, n in names.items()}
    rules = _rules({k: n for k, n in final.items() if n != plain[k]}, source)
    if not best.source:
        return Recipe(rules, rest=f"{{k...}} -> {escape(best.target)}{{k...}}" if best.target else "keep"), notes
    inside = Scope(Recipe(rest="keep"), escape(best.source), escape(best.target))
    return Recipe(rules, rest="keep", scopes=[inside]), notes


def _rules(names: Mapping[str, str], source: Specs) -> list[str]:
    """A rule for each form of key, where its numbers go along as they are; else one for each key."""
    forms: dict[str, list[str]] = {}
    for key in source:
        forms.setdefault(NUMBERS.sub("0", key), []).append(key)
    shapes = [form.split(".") for form in forms]
    rules: list[str] = []
    for form, keys in forms.items():
        renamed = {k: names[k] for k in keys if k in names}
        made = {NUMBERS.sub("0", n) for n in renamed.values()}
        along = all(NUMBERS.findall(k) == NUMBERS.findall(n) for k, n in renamed.items())
        if 1 < len(keys) == len(renamed) and len(made) == 1 and along and _alone(form.split("."), shapes):
            rules.append(f"{_numbered(form)} -> {_numbered(made.pop())}")
            continue
        rules += [f"{escape(k)} -> {escape(n)}" for k, n in renamed.items()]
    return rules


def _alone(form: Sequence[str], others: Sequence[Sequence[str]]) -> bool:
    """Whether a pattern with a capture for each number of a form matches the keys of no other form."""
    spelt = [(at, segment) for at, segment in enumerate(form) if segment != "0"]
    alike = (o for o in others if len(o) == len(form) and all(o[at] == segment for at, segment in spelt))
    return all(list(o) == list(form) for o in alike)


def _numbered(form: str) -> str:
    """A form as a pattern: a capture for each number, counted in their order."""
    count = iter(range(form.count(".") + 1))
    return ".".join(f"{{n{next(count)}}}" if s == "0" else escape(s) for s in form.split("."))


def _ambiguous(best: Alignment, rivals: Sequence[Alignment]) -> LoadError:
    found = [best, *rivals]
    notes = tuple(
        f"{f.source or f.target or '(no prefix)'}  {counted(len(f.matched), 'key')}, {f.equal} with equal shapes"
        for f in found
    )
    source = [f.source.rstrip(".") for f in found if f.source]
    one = tuple(Remedy("subtree", path) for path in source[:1])
    advice = None if one else "load into the submodule that is meant: load_into(model.part, …)"
    return LoadError(
        Diagnostic(
            "ambiguous-prefix",
            f"{len(found)} parts fit equally well: which one is meant?",
            notes=notes,
            remedies=one,
            advice=advice,
        )
    )
