"""The names of a source in the model's own layout: prefixes and respellings, no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import Diagnostic, LoadError, Remedy
from ..language.captures import escape
from ..language.folding import fold
from ..planning.naming import dropped_keys
from ..planning.plan import Plan, renaming
from ..specs import TensorSpec
from ..wording import counted
from .aligning import Alignment, align
from .spelling import respelled

__all__ = ["OwnNames", "own_names"]

Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class OwnNames:
    """The names that a model has for the tensors of a source in its own layout.

    Args:
        plan: copies each tensor to its name. notes: what was done to the names, for people.
        problems: two tensors that come to one name. away: paths of `drop` that settle all of theirs.
    """

    plan: Plan
    notes: list[str]
    problems: list[Diagnostic]
    away: Collection[str] = ()


def own_names(source: Specs, target: Specs, drop: Sequence[str] = ()) -> OwnNames:
    """Plan the copies that bring a source's keys to the model's names: prefixes and respellings, no more.

    >>> spec = TensorSpec([2], "F32")
    >>> found = own_names({"module.norm.gamma": spec, "module.norm.bias": spec},
    ...                   {"norm.weight": spec, "norm.bias": spec})
    >>> found.notes
    ["prefix 'module.' taken off", "1 key in another spelling, such as 'norm.gamma' for 'norm.weight'"]
    >>> list(found.plan.specs)
    ['norm.weight', 'norm.bias']

    Args:
        drop: what the caller leaves out, so that it is no evidence for a prefix.

    Raises:
        LoadError: two parts of one side fit the other equally well.
    """
    dropped = dropped_keys(drop, source, {}, [])
    best, rivals = align({k: s for k, s in source.items() if k not in dropped} if dropped else source, target)
    if rivals:
        raise _ambiguous(best, rivals)
    notes = best.notes
    # a key that the model has under its own name stays, whatever prefix the others carry
    names = {k: k if k not in best.matched and k in target else best.name(k) for k in source}
    named = set(names.values())
    left = {n: source[k] for k, n in names.items() if n not in target}
    other = respelled(left, {k: s for k, s in target.items() if k not in named}) if left else {}
    if other:
        one, two = next(iter(other.items()))
        notes.append(f"{len(other)} key{'s' * (len(other) > 1)} in another spelling, such as {one!r} for {two!r}")
        names = {k: other.get(n, n) for k, n in names.items()}
    twice, away = _twice(names, dropped) if len(set(names.values())) < len(names) else ({}, {})
    kept = {k: n for k, n in names.items() if k not in away and k not in twice}
    text = f"{escape(best.source)}{{k...}} -> {escape(best.target)}{{k...}}"
    plan = replace(renaming(source, kept, text), dropped={k: f"drop = {path!r}" for k, path in away.items()})
    settled = {*away.values()} - {path for k, path in dropped.items() if k not in away}
    return OwnNames(plan, notes, [_made_twice(twice)] if twice else [], settled)


def _twice(names: Mapping[str, str], dropped: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Source keys whose name another one has: those that nothing settles, and those that the caller drops."""
    twice: dict[str, str] = {}
    away: dict[str, str] = {}
    taken: set[str] = set()
    for key in sorted(names, key=dropped.__contains__):
        if names[key] not in taken:
            taken.add(names[key])
        elif key in dropped:
            away[key] = dropped[key]
        else:
            twice[key] = names[key]
    return twice, away


def _made_twice(twice: Mapping[str, str]) -> Diagnostic:
    key, name = next(iter(twice.items()))
    return Diagnostic(
        "made-twice",
        f"{counted(len(twice), 'source tensor', 'has')} the same name in the model as another one: {key!r} as {name!r}",
        notes=tuple(text for text, _ in fold(list(twice))[:8]),
        remedies=(Remedy("drop", [escape(k) for k in twice], "takes the other"),),
    )


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
