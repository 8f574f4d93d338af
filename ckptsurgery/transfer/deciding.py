"""Every key of both sides settled: loaded, initialised, kept, tied, dropped; or an error that names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ..errors import Diagnostic, LoadError, RecipeError, Remedy, literal
from ..language.covering import exact_paths
from ..language.folding import fold, fold_groups
from ..language.keys import KeyPattern
from ..modeling.initialising import by_name
from ..specs import DTYPES, TensorSpec
from ..wording import counted

__all__ = ["Decision", "Wishes", "below", "decide", "named_keys", "samples"]


@dataclass(frozen=True)
class Wishes:
    """What the caller said of single parts.

    Args:
        init: module path, key or pattern of the model -> initialiser.
        keep: what stays as constructed. drop: what the source holds in vain.
        mismatch: "error", "init" or "keep". partial: whether what does not fit is only listed.
    """

    init: Mapping[str, Any] = field(default_factory=dict)
    keep: Sequence[str] = ()
    drop: Sequence[str] = ()
    mismatch: str = "error"
    partial: bool = False


@dataclass
class Decision:
    """The outcome for each key.

    Args:
        load: target keys that take what the source makes for them.
        inits: target key -> initialiser; `own` keeps what is there.
        missing: target keys that nothing fills, kept as built.
        aside: made keys that were set aside -> why.
        unexpected: made keys that the model has no place for, or that do not fit -> why.
        refused: made keys that fit in name and shape, and must not be loaded as they are.
        unfilled: missing keys that the source does hold something for -> why that was not loaded.
        problems: what stands against the load.
    """

    load: list[str] = field(default_factory=list)
    inits: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    aside: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    unfilled: dict[str, str] = field(default_factory=dict)
    problems: list[Diagnostic] = field(default_factory=list)


def decide(
    made: Mapping[str, TensorSpec],
    origins: Mapping[str, tuple[str, ...]],
    target: Mapping[str, TensorSpec],
    ties: Sequence[Sequence[str]],
    wishes: Wishes,
    tolerated: Iterable[str] = (),
    inits: Mapping[str, Any] | None = None,
    doubts: Mapping[str, str] | None = None,
) -> Decision:
    """Settle every key.

    Args:
        made: target-side key -> spec, of all that the source offers.
        origins: made key -> the source keys behind it.
        target: what the model wants. ties: which of its keys are one tensor.
        tolerated: target keys that may be missing without a word from the caller, such as counters.
        inits: target keys that the recipe initialises.
        doubts: made keys that must not be loaded as they are -> why.
    """
    out = Decision()
    doubts = doubts or {}
    tied = {n: group for group in ties for n in group}
    init_keys: dict[str, Any] = {}
    for path, what in wishes.init.items():
        init_keys.update(_initialisers(_named(path, target, "init", out), what, out))
    keep_keys = {k for path in wishes.keep for k in _named(path, target, "keep", out)}
    _check_both(init_keys, keep_keys, tied, made, out)
    dropped = _dropped(wishes.drop, made, origins, out)
    mismatched: dict[str, TensorSpec] = {}
    for key, spec in made.items():
        if key in dropped:
            out.aside[key] = f"drop = {dropped[key]!r}"
        elif key in init_keys or key in keep_keys:
            out.aside[key] = "set aside: the model's own is " + ("initialised" if key in init_keys else "kept")
        elif key not in target:
            out.unexpected[key] = "no place in the model"
        elif target[key].shape != spec.shape and wishes.partial and wishes.mismatch == "error":
            out.unexpected[key] = f"{list(spec.shape)} here, {list(target[key].shape)} in the model"
            out.unfilled[key] = f"the source holds another shape, {list(spec.shape)}"
        elif target[key].shape != spec.shape:
            mismatched[key] = spec
        elif key in doubts:
            out.refused.append(key)
            out.unfilled[key] = doubts[key]
            if wishes.partial:
                out.unexpected[key] = doubts[key]
        else:
            out.load.append(key)
    _mismatches(mismatched, target, wishes, out)
    out.inits.update(inits or {})
    out.inits.update(init_keys)
    out.inits.update(dict.fromkeys(keep_keys, "own"))
    _missing(target, tied, wishes, set(tolerated), {*mismatched, *out.refused}, out)
    if out.unexpected and not wishes.partial:
        out.problems.append(_unexpected(list(out.unexpected), made, origins))
    return out


def _initialisers(keys: Sequence[str], what: Any, out: Decision) -> dict[str, Any]:
    """Key -> initialiser, where one serves all or the last part of the key says which."""
    try:
        return dict(by_name(keys, what))
    except LoadError as error:
        out.problems += error.diagnostics
        return dict.fromkeys(keys, "default")  # they are spoken for: one mistake is told once


def below(path: str, keys: Iterable[str]) -> list[str]:
    """The keys that a module path, a key or a pattern names.

    Raises:
        RecipeError: the pattern does not parse.
    """
    known = list(keys)
    found = [k for k in known if k == path or k.startswith(path + ".")]
    if found or "{" not in path:
        return found
    pattern, inside = KeyPattern.parse(path), KeyPattern.parse(path + ".{below...}")
    return [k for k in known if pattern.match(k) is not None or inside.readings(k)]


def _named(path: str, keys: Mapping[str, TensorSpec], argument: str, out: Decision) -> list[str]:
    """Keys that a module path, a key or a pattern names."""
    try:
        found = below(path, keys)
    except RecipeError as error:
        out.problems += error.diagnostics
        return []
    if not found:
        known = {k.rpartition(".")[0] for k in keys} | {k.partition(".")[0] for k in keys} | set(keys)
        modules = sorted(known - {""})
        near = get_close_matches(path, modules, 3)
        out.problems.append(
            Diagnostic(
                "no-such-module",
                f"{argument}={path!r} names nothing here",
                remedies=(Remedy(argument, {path: near}, kind="instead"),) if near else (),
                advice=None if near else "there are: " + ", ".join(sorted({k.partition(".")[0] for k in keys})[:8]),
            )
        )
    return found


def _dropped(
    paths: Sequence[str], made: Mapping[str, TensorSpec], origins: Mapping[str, tuple[str, ...]], out: Decision
) -> dict[str, str]:
    """Made keys that a `drop` names, by their own name or by that of a source key."""
    dropped: dict[str, str] = {}
    for path in paths:
        by_source = {s: m for m, keys in origins.items() for s in keys}
        pool = {**dict.fromkeys(by_source, TensorSpec((), "F32")), **made}
        dropped.update({by_source.get(k, k): path for k in _named(path, pool, "drop", out)})
    return dropped


def named_keys(
    wishes: Wishes,
    made: Mapping[str, TensorSpec],
    origins: Mapping[str, tuple[str, ...]],
    target: Mapping[str, TensorSpec],
) -> set[str]:
    """All that `init`, `keep` or `drop` names of what is made; a name that names nothing is for `decide` to tell."""
    scratch = Decision()
    named = {k for path in wishes.init for k in _named(path, target, "init", scratch)}
    named |= {k for path in wishes.keep for k in _named(path, target, "keep", scratch)}
    return (named | _dropped(wishes.drop, made, origins, scratch).keys()) & made.keys()


def _check_both(
    inits: Mapping[str, Any],
    keeps: set[str],
    tied: Mapping[str, Sequence[str]],
    made: Mapping[str, TensorSpec],
    out: Decision,
) -> None:
    both = sorted(inits.keys() & keeps)
    if both:
        out.problems.append(
            Diagnostic(
                "init-and-keep", f"{counted(len(both), 'key', 'is')} in both init= and keep=", notes=tuple(both[:6])
            )
        )
    for argument, named, verb in (("init", inits.keys(), "initialise"), ("keep", keeps, "keep")):
        for key in sorted(named):
            others = [n for n in tied.get(key, ()) if n not in named and n in made]
            if others:
                text = f"{key!r} is tied to {others[0]!r}, which the source fills: to {verb} one is to lose the other"
                untie = Remedy("untie", f"cs.untie(model, {literal(key)})", kind="before")
                advice = "or leave the name out"
                out.problems.append(Diagnostic(f"{argument}-of-tied", text, remedies=(untie,), advice=advice))


_SETTLED = (("init", "initialises these"), ("keep", "leaves them"))


def _mismatches(
    wrong: Mapping[str, TensorSpec],
    target: Mapping[str, TensorSpec],
    wishes: Wishes,
    out: Decision,
) -> None:
    if wishes.mismatch != "error":
        for key in wrong:
            out.aside[key] = f"mismatch={wishes.mismatch!r}: {list(wrong[key].shape)} against {list(target[key].shape)}"
            out.inits[key] = "default" if wishes.mismatch == "init" else "own"
        return
    kinds: dict[bool, dict[str, TensorSpec]] = {}
    for key, spec in wrong.items():
        kinds.setdefault(DTYPES[target[key].dtype].kind == "float", {})[key] = spec
    out.problems += [_mismatched(alike, target) for alike in kinds.values()]


def _mismatched(wrong: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec]) -> Diagnostic:
    lines = []
    for group in fold_groups(wrong, label=lambda k: (wrong[k].shape, target[k].shape)):
        first = group.first
        lines.append(f"{group.text}  source {list(wrong[first].shape)}, model {list(target[first].shape)}")
    init, keep = (Remedy(argument, exact_paths(wrong, target), effect) for argument, effect in _SETTLED)
    if any(DTYPES[target[k].dtype].kind != "float" for k in wrong):
        init, keep = keep, init  # no initialiser makes an index or a mask
    every = Remedy("mismatch", init.argument, f'or "{keep.argument}" does so for all')
    return Diagnostic(
        "shape-mismatch",
        f"{counted(len(wrong), 'tensor', 'has')} another shape in the model",
        notes=tuple(lines[:16]),
        remedies=(init, keep, every),
    )


def _missing(
    target: Mapping[str, TensorSpec],
    tied: Mapping[str, Sequence[str]],
    wishes: Wishes,
    tolerated: set[str],
    told: set[str],
    out: Decision,
) -> None:
    """What nothing fills stays as built; it is a problem unless tolerated, or told already."""
    spoken_for = told if not wishes.partial else told - set(out.refused)
    filled = {*out.load, *out.inits, *spoken_for}
    missing = [k for k in target if k not in filled and not any(n in filled for n in tied.get(k, ()))]
    out.inits.update(dict.fromkeys(missing, "own"))
    firm = out.missing = [k for k in missing if k not in tolerated]
    if firm and not wishes.partial:
        lines = tuple(f"{g.text}  {target[g.first]}" for g in fold_groups(firm, label=target.get)[:16])
        paths = exact_paths(firm, target)
        options = [("init", paths, "initialises them"), ("keep", paths, "leaves them as built")]
        verb = "tensor of the model is" if len(firm) == 1 else "tensors of the model are"
        out.problems.append(
            Diagnostic(
                "missing-keys",
                f"{len(firm)} {verb} not in the source",
                notes=lines,
                remedies=(*(Remedy(*o) for o in options), Remedy("partial", True, "loads the rest")),
            )
        )


def _unexpected(
    keys: Sequence[str], made: Mapping[str, TensorSpec], origins: Mapping[str, tuple[str, ...]]
) -> Diagnostic:
    sources = list(dict.fromkeys(s for k in keys for s in origins.get(k, (k,))))
    specs = {s: made[k] for k in keys for s in origins.get(k, (k,))}
    folded = fold_groups(sources, label=specs.get)
    lines = tuple(f"{g.text}  {specs[g.first]}" for g in folded[:12])
    paths = exact_paths(sources, {*(s for found in origins.values() for s in found), *(made.keys() - set(keys))})
    return Diagnostic(
        "unexpected-keys",
        f"{counted(len(sources), 'source tensor', 'has')} no place in the model",
        notes=lines,
        remedies=(Remedy("drop", paths, "leaves them out"), Remedy("partial", True, "loads what fits")),
    )


def samples(keys: Iterable[str], most: int = 4) -> str:
    """A few keys, folded, for a message."""
    texts = [text for text, _ in fold(list(keys))]
    return ", ".join(texts[:most]) + (", …" if len(texts) > most else "") or "no tensors"
