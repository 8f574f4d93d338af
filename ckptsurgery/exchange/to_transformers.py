"""A recipe as conversions of the transformers library: `WeightRenaming` and `WeightConverter` objects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import Diagnostic, RecipeError
from ..language.captures import Capture, Literal
from ..language.recipe import Recipe
from ..language.rules import Rule
from .conversion_axes import NotSayable
from .exporting import RuleSide, each_rule, expanded, single
from .full_matches import KeyRename, in_order

__all__ = ["to_transformers"]

Pieces = tuple[Literal | Capture, ...]
_TARGET = "a conversion of transformers"


def to_transformers(recipe: Recipe) -> list[Any]:
    """Return a recipe from files to model as the transformers library's conversions.

    Register them by the library's own call; `from_pretrained` then loads by them, and `save_pretrained` saves back:

        register_checkpoint_conversion_mapping("my_type", cs.recipes.to_transformers(recipe), overwrite=True)

    Renames may keep captures in one place of the key. Of rearrangements the library has joining, splitting, stacking,
    transposing, interleaving and the rotary permutation. Keys that no rule names keep their names there, as with
    `rest="keep"`; with `rest="error"` nothing refuses them, and the library reports those that the model does not have.

    Raises:
        RecipeError: every rule that the library cannot say, with the reason; `drop` and `rest="drop"`; renames of which
            one would rename what another made.
    """
    _check_left_out(recipe)
    found = [one for listed in each_rule(recipe, _TARGET, _said) for one in listed]
    # A key is renamed first and converted afterwards, so that a renaming must not touch what a converter reads.
    converters = [one for one in found if not isinstance(one, KeyRename)]
    return [*_renamings([one for one in found if isinstance(one, KeyRename)]), *converters]


def _check_left_out(recipe: Recipe) -> None:
    """Refuse what leaves tensors out: the library passes on each key of a file that it does not rename."""
    parts = {"drop": recipe.drop, "rest = 'drop'": recipe.rest == "drop"}
    reason = "the library takes every key of a file on"
    wrong = [
        Diagnostic("not-exportable", f"{_TARGET} cannot say {part}: {reason}") for part, given in parts.items() if given
    ]
    if wrong:
        raise RecipeError(wrong)


def _renamings(renames: list[KeyRename]) -> list[Any]:
    from transformers.core_model_loading import WeightRenaming

    try:
        return [WeightRenaming(*one.patterns()) for one in in_order(renames)]
    except NotSayable as reason:
        raise RecipeError(Diagnostic("not-exportable", f"{_TARGET} cannot say these renames: {reason}")) from None


def _said(rule: Rule, recipe: Recipe) -> list[Any]:
    source, target = single(rule)
    if source.axes == target.axes and not _gathered(source, target) and not _gathered(target, source):
        renames = [KeyRename(a.pieces, b.pieces) for a, b in expanded(source, target)]
        for one in renames:
            one.patterns()  # refused here, with its rule
        return renames
    return [_converter(a, b, recipe) for a, b in expanded(source, target)]


def _gathered(one: RuleSide, other: RuleSide) -> list[Capture]:
    """The captures that only the first key has."""
    return [c for c in one.captures if c.name not in {o.name for o in other.captures}]


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
        if interleaved and len(scattered[0].choices or ()) != 2:
            raise NotSayable("interleaved parts that are not two")
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
