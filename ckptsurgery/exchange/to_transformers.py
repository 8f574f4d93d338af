"""A recipe as conversions of the transformers library: `WeightRenaming` and `WeightConverter` objects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..language.captures import Capture, Literal
from ..language.recipe import Recipe
from ..language.rules import Rule
from .conversion_axes import NotSayable
from .exporting import RuleSide, each_rule, expanded, single

__all__ = ["to_transformers"]

Pieces = tuple[Literal | Capture, ...]
_TARGET = "a conversion of transformers"


def to_transformers(recipe: Recipe) -> list[Any]:
    """Return a recipe from files to model as the transformers library's conversions.

    Register them by the library's own call; `from_pretrained` then loads by them, and `save_pretrained` saves back:

        register_checkpoint_conversion_mapping("my_type", cs.recipes.to_transformers(recipe), overwrite=True)

    Renames may keep captures in one place of the key. Of rearrangements the library has joining, splitting, stacking,
    transposing, interleaving and the rotary permutation. Keys that no rule names keep their names there, so `rest` is
    "keep".

    Raises:
        RecipeError: every rule that the library cannot say, with the reason.
    """
    found = [one for listed in each_rule(recipe, _TARGET, _said) for one in listed]
    from transformers.core_model_loading import WeightConverter

    # A key is renamed first and converted afterwards, so that a renaming must not touch what a converter reads.
    return sorted(found, key=lambda one: isinstance(one, WeightConverter))


def _said(rule: Rule, recipe: Recipe) -> list[Any]:
    source, target = single(rule)
    if source.axes == target.axes and not _gathered(source, target) and not _gathered(target, source):
        return [_renaming(a.pieces, b.pieces) for a, b in expanded(source, target)]
    return [_converter(a, b, recipe) for a, b in expanded(source, target)]


def _gathered(one: RuleSide, other: RuleSide) -> list[Capture]:
    """The captures that only the first key has."""
    return [c for c in one.captures if c.name not in {o.name for o in other.captures}]


def _renaming(source: Pieces, target: Pieces) -> Any:
    from transformers.core_model_loading import WeightRenaming

    left, right = _trimmed(source, target)
    return WeightRenaming(left, right)


def _trimmed(source: Pieces, target: Pieces) -> tuple[str, str]:
    """A regular expression and its replacement for two keys, without what both begin and end with if it may be any.

    The library replaces the first match, and knows one group: the captures that stay are in one stretch of the key.
    """
    open_start = _rest(source, 0) is not None and _rest(source, 0) == _rest(target, 0)
    open_end = len(source) > 1 and _rest(source, -1) is not None and _rest(source, -1) == _rest(target, -1)
    source, target = (p[open_start : len(p) - open_end] for p in (source, target))
    names = [c.name for c in source if isinstance(c, Capture)]
    if names != [c.name for c in target if isinstance(c, Capture)]:
        raise NotSayable("captures in another order, or of one side alone")
    start = "" if open_start else "^"
    if not names:
        return start + _text(source, re.escape), _text(target, str)
    first, last = (next(n for n, p in enumerate(side) if isinstance(p, Capture)) for side in (source, source[::-1]))
    other_first = next(n for n, p in enumerate(target) if isinstance(p, Capture))
    other_last = next(n for n, p in enumerate(target[::-1]) if isinstance(p, Capture))
    middle, other = source[first : len(source) - last], target[other_first : len(target) - other_last]
    if [str(p) for p in middle] != [str(p) for p in other]:
        raise NotSayable("text between two captures changes")
    group = "".join(re.escape(p.text) if isinstance(p, Literal) else _inner(p) for p in middle)
    ends = (source[:first], source[len(source) - last :]), (target[:other_first], target[len(target) - other_last :])
    left = start + _text(ends[0][0], re.escape) + f"({group})" + _text(ends[0][1], re.escape)
    return left, _text(ends[1][0], str) + r"\1" + _text(ends[1][1], str)


def _inner(capture: Capture) -> str:
    if capture.rest:
        return r".+"
    if capture.choices is not None:
        raise NotSayable(f"the choice {{{capture}}} beside another capture")
    return r"[^./]+"


def _rest(pieces: Pieces, at: int) -> str | None:
    """The name of a capture of whole segments at an end."""
    piece = pieces[at] if pieces else None
    return piece.name if isinstance(piece, Capture) and piece.rest else None


def _text(pieces: Sequence[Literal | Capture], each: Any) -> str:
    return "".join(each(p.text) for p in pieces if isinstance(p, Literal))


def _converter(source: RuleSide, target: RuleSide, recipe: Recipe) -> Any:
    from transformers.core_model_loading import WeightConverter

    if source.axes is None or target.axes is None:
        raise NotSayable("tensors gathered or scattered without axes")
    gathered, scattered = _gathered(source, target), _gathered(target, source)
    steps = _operations(source, target, gathered, scattered, recipe)
    stacked = next((c.name for c in gathered if not c.choices), None)
    left = [_glob(a, stacked) for a in _apart(source, [c for c in gathered if c.choices])]
    right = [_glob(a, None) for a in _apart(target, [c for c in scattered if c.choices])]
    lefts = [_shared(one, right[0])[0] for one in left]
    rights = [_shared(left[0], one)[1] for one in right]
    return WeightConverter(lefts, rights if len(rights) > 1 else rights[0], steps)


def _apart(side: RuleSide, choices: Sequence[Capture]) -> list[Pieces]:
    """The key of each choice."""
    found: list[Pieces] = [side.pieces]
    for capture in choices:
        found = [
            tuple(Literal(text) if p == capture else p for p in pieces)
            for pieces in found
            for text in capture.choices or ()
        ]
    return found


def _glob(pieces: Pieces, stacked: str | None) -> Pieces:
    """The key with the library's star in the place of a number that is stacked."""
    return tuple(Literal("*") if isinstance(p, Capture) and p.name == stacked else p for p in pieces)


def _shared(one: Pieces, other: Pieces) -> tuple[str, str]:
    """Both keys without the captures at their ends, which the library leaves alone."""
    while one and other and isinstance(one[0], Capture) and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and isinstance(one[-1], Capture) and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    if any(isinstance(p, Capture) for p in (*one, *other)):
        common = 0
        while common < min(len(one), len(other)) and one[common] == other[common]:
            common += 1
        one, other = one[common:], other[common:]
    if any(isinstance(p, Capture) for p in (*one, *other)) or not one or not other:
        raise NotSayable("a capture inside of what changes")
    return _text(one, str), _text(other, str)


def _operations(
    source: RuleSide, target: RuleSide, gathered: Sequence[Capture], scattered: Sequence[Capture], recipe: Recipe
) -> list[Any]:
    """The library's operations that turn the axes of one side into those of the other."""
    from transformers import core_model_loading as library

    before, after = [list(d) for d in source.axes or ()], [list(d) for d in target.axes or ()]
    steps: list[Any] = []
    stacked = [c.name for c in gathered if not c.choices]
    joined, split = [c.name for c in gathered if c.choices], [c.name for c in scattered if c.choices]
    if len(stacked) > 1 or len(joined) > 1 or len(split) > 1 or len(scattered) > len(split) or (joined and split):
        raise NotSayable("more than one list, or lists of no known length")
    if stacked:
        at = next((n for n, d in enumerate(after) if d == [stacked[0]]), None)
        if at is None:
            raise NotSayable("a list that is joined rather than stacked")
        steps.append(library.MergeModulelist(dim=at))
        before.insert(at, [stacked[0]])
    if joined:
        at = next((n for n, d in enumerate(after) if d[0] == joined[0] and len(d) == 2), None)
        if at is None:
            raise NotSayable("parts that are not joined one after another")
        steps.append(library.Concatenate(dim=at))
        after[at] = after[at][1:]
    if split:
        at = next((n for n, d in enumerate(before) if split[0] in d and len(d) == 2), None)
        if at is None:
            raise NotSayable("parts that are not cut one after another")
        ragged = any(":" in name for name in before[at])
        interleaved = before[at][1] == split[0]
        steps += [library.Interleave(dim=at)] if interleaved else []
        steps.append(library.Split(dim=at) if ragged else library.Chunk(dim=at))
        before[at] = [name for name in before[at] if name != split[0]]
    if before != after:
        steps.insert(0 if split else len(steps), _rearrangement(before, after, recipe))
    if not steps:
        raise NotSayable("nothing that changes")
    return steps


def _rearrangement(before: list[list[str]], after: list[list[str]], recipe: Recipe) -> Any:
    """One of the library's operations on a single tensor."""
    from transformers import core_model_loading as library

    changed = [n for n, (a, b) in enumerate(zip(before, after)) if a != b]
    if len(before) != len(after):
        raise NotSayable("another number of dimensions")
    if len(changed) == 2 and before[changed[0]] == after[changed[1]] and before[changed[1]] == after[changed[0]]:
        return library.Transpose(dim0=changed[0], dim1=changed[1])
    if len(changed) == 1:
        a, b, two = before[changed[0]], after[changed[0]], [n for n, size in recipe.dims.items() if size == 2]
        if len(a) == 2 and a[::-1] == b and (a[0] in two or a[1] in two):
            return library.Interleave(dim=changed[0], inverse=a[0] in two)
        if len(a) == 3 and a[0] == b[0] and a[1:] == b[:0:-1] and (a[1] in two or a[2] in two) and changed == [0]:
            return library.PermuteForRope(subconfig_key=_part_of(recipe.dims.get(a[0])), inverse=a[1] in two)
    raise NotSayable("a rearrangement that no operation of it makes")


def _part_of(heads: Any) -> str | None:
    """Which part of the config counts the heads, as the library reads it."""
    found = re.fullmatch(r"config\.(?:(\w+)\.)?num_attention_heads", str(heads))
    if found is None:
        raise NotSayable(f"a number of heads that is not the config's own: {heads}")
    return found.group(1)
