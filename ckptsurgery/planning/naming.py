"""The keys that the arguments of a load name: by a module path, a key or a pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ..errors import Diagnostic, RecipeError, Remedy
from ..language.keys import KeyPattern
from .options import LoadOptions
from .settlement import Offer

__all__ = ["below", "dropped_keys", "named_keys", "set_aside"]


def below(path: str, keys: Iterable[str]) -> list[str]:
    """Return the keys that a module path, a key or a pattern names.

    >>> below("h", ["h.0.w", "head.w"]), below("{m}.w", ["h.0.w", "head.w"])
    (['h.0.w'], ['head.w'])

    Raises:
        RecipeError: the pattern does not parse.
    """
    known = list(keys)
    found = [k for k in known if k == path or k.startswith(path + ".")]
    if found or "{" not in path:
        return found
    pattern, inside = KeyPattern.parse(path), KeyPattern.parse(path + ".{below...}")
    return [k for k in known if pattern.match(k) is not None or inside.readings(k)]


def named_keys(path: str, keys: Iterable[str], argument: str, problems: list[Diagnostic]) -> list[str]:
    """Return the keys that a path names; where it names none, that is added to the problems.

    Args:
        argument: the caller's, for the message.
    """
    known = list(keys)
    try:
        found = below(path, known)
    except RecipeError as error:
        problems += error.diagnostics
        return []
    if not found:
        modules = {k.rpartition(".")[0] for k in known} | {k.partition(".")[0] for k in known} | set(known)
        near = get_close_matches(path, sorted(modules - {""}), 3)
        problems.append(
            Diagnostic(
                "no-such-module",
                f"{argument}={path!r} names nothing here",
                remedies=(Remedy(argument, {path: near}, kind="instead"),) if near else (),
                advice=None if near else "there are: " + ", ".join(sorted({k.partition(".")[0] for k in known})[:8]),
            )
        )
    return found


def dropped_keys(
    paths: Sequence[str], made: Mapping[str, Any], origins: Mapping[str, tuple[str, ...]], problems: list[Diagnostic]
) -> dict[str, str]:
    """Return the offered keys that `drop=` names, by their own name or by that of a source key -> the path.

    Args:
        made: the keys that are offered. origins: the source keys behind each.
    """
    dropped: dict[str, str] = {}
    if paths:
        by_source = {s: m for m, keys in origins.items() for s in keys}
        pool = {**by_source, **made}
        for path in paths:
            dropped.update({by_source.get(k, k): path for k in named_keys(path, pool, "drop", problems)})
    return dropped


def set_aside(options: LoadOptions, offer: Offer, wanted: Iterable[str]) -> set[str]:
    """Return the offered keys that `init=`, `keep=` or `drop=` names; a path that names none is told elsewhere."""
    keys = list(wanted)
    named = {k for path in (*options.init, *options.keep) for k in named_keys(path, keys, "init", [])}
    return (named | dropped_keys(options.drop, offer.specs, offer.origins, []).keys()) & offer.specs.keys()
