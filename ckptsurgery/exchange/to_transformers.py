"""A recipe as conversions of the transformers library: `WeightRenaming` and `WeightConverter` objects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import Diagnostic, RecipeError
from ..language.captures import Capture, Literal
from ..language.keys import KeyPattern
from ..language.recipe import Recipe
from ..language.rules import Rule
from .conversion_axes import NotSayable
from .exporting import RuleSide, each_rule, expanded, filled, single
from .full_matches import KeyRename, in_order, made_anew
from .whole_key_transforms import transform_classes

__all__ = ["to_transformers"]

Pieces = tuple[Literal | Capture, ...]
_TARGET = "a conversion of transformers"
_PLAIN = re.compile(r"[\w./-]*")


@dataclass(frozen=True)
class KeyConversion:
    """Tensors whose keys match patterns, and the operations that are done to them.

    Args:
        sources, targets: the patterns, of whole keys; several on one side at most.
        steps: the library's operations.
    """

    sources: tuple[Pieces, ...]
    targets: tuple[Pieces, ...]
    steps: tuple[Any, ...]

    def texts(self) -> tuple[list[str], list[str]]:
        """Return the texts between the captures that stay on all sides, with a star where tensors are stacked.

        Raises:
            NotSayable: a capture inside of these texts; a character that the library reads as a pattern.
        """
        sides = (*self.sources, *self.targets)
        kept = [c for c in _captures(sides[0]) if all(c in _captures(side) for side in sides)]
        found: list[list[str]] = []
        for cut in range(len(kept) + 1):
            parts = [_parted(side, kept, cut) for side in sides]
            if len({(before, after) for before, _, after in parts}) == 1 and all(text for _, text, _ in parts):
                found.append([text for _, text, _ in parts])
        if not found:
            raise NotSayable("a capture inside of what changes")
        texts = max(found, key=lambda one: min(map(len, one)))
        return texts[: len(self.sources)], texts[len(self.sources) :]


def _captures(pieces: Pieces) -> list[Capture]:
    return [piece for piece in pieces if isinstance(piece, Capture)]


def _parted(pieces: Pieces, kept: Sequence[Capture], cut: int) -> tuple[Pieces, str, Pieces]:
    """A key in three: to the capture of this number, the text from there to the next, the rest.

    Raises:
        NotSayable: the captures that are kept stand in another order, or twice.
    """
    at = [n for n, piece in enumerate(pieces) if piece in kept]
    if [pieces[n] for n in at] != list(kept):
        raise NotSayable("captures in another order, or of one side alone")
    first = at[cut - 1] + 1 if cut else 0
    last = at[cut] if cut < len(at) else len(pieces)
    text = "".join(p.text if isinstance(p, Literal) else "*" for p in pieces[first:last])
    return pieces[:first], text, pieces[last:]


def to_transformers(recipe: Recipe) -> list[Any]:
    """Return a recipe from files to model as the transformers library's conversions.

    Register them by the library's own call; `from_pretrained` then loads by them, and `save_pretrained` saves back:

        register_checkpoint_conversion_mapping("my_type", cs.recipes.to_transformers(recipe), overwrite=True)

    They are `WeightRenaming` and `WeightConverter` objects that match whole keys, as the plan does. A model that was
    loaded by them is saved under the names of its files: each key that they made goes back, and no other. Of
    rearrangements the library has joining, splitting, stacking, transposing, interleaving and the rotary permutation.
    Keys that no rule names keep their names there, as with `rest="keep"`; with `rest="error"` nothing refuses them,
    and the library reports those that the model does not have.

    Raises:
        RecipeError: every rule that the library cannot say, with the reason; `drop` and `rest="drop"`; renames whose
            result would be renamed again, or converted.
    """
    _check_left_out(recipe)
    found = [one for listed in each_rule(recipe, _TARGET, _said) for one in listed]
    renames = [one for one in found if isinstance(one, KeyRename)]
    conversions = [one for one in found if isinstance(one, KeyConversion)]
    try:
        return [*map(_renaming, _ordered(renames, conversions)), *_converters(conversions)]
    except NotSayable as reason:
        raise RecipeError(Diagnostic("not-exportable", f"{_TARGET} cannot say these renames: {reason}")) from None


def _check_left_out(recipe: Recipe) -> None:
    """Refuse what leaves tensors out: the library passes on each key of a file that it does not rename."""
    parts = {"drop": recipe.drop, "rest = 'drop'": recipe.rest == "drop"}
    reason = "the library takes every key of a file on"
    wrong = [
        Diagnostic("not-exportable", f"{_TARGET} cannot say {part}: {reason}") for part, given in parts.items() if given
    ]
    if wrong:
        raise RecipeError(wrong)


def _ordered(renames: Sequence[KeyRename], conversions: Sequence[KeyConversion]) -> list[KeyRename]:
    """The renames in an order in which none meets what another made; a key is converted after all of them."""
    read = [source for one in conversions for source in one.sources]
    for rename in renames:
        if any(made_anew(rename, source) for source in read):
            raise NotSayable(f"the result of '{rename}' would be converted")
    return in_order(renames)


def _renaming(rename: KeyRename) -> Any:
    left, right = KeyPattern(rename.source), KeyPattern(rename.target)
    return transform_classes()["WholeKeyRenaming"](str(left), str(right), [left], [right])


def _converters(conversions: Sequence[KeyConversion]) -> list[Any]:
    """The library's converters, each with pattern texts of its own, forth and back."""
    made, seen = list[Any](), set[str]()
    kind = transform_classes()["WholeKeyConverter"]
    for number, one in enumerate(conversions):
        lefts, rights = one.texts()
        mark = "" if seen.isdisjoint((*lefts, *rights)) else f"(?#{number})"  # the library takes comments out of names
        seen.update((*lefts, *rights))
        old, new = ([mark + text for text in side] for side in (lefts, rights))
        sources, targets = ([KeyPattern(pieces) for pieces in side] for side in (one.sources, one.targets))
        made.append(kind(old, new, list(one.steps), lefts=sources, rights=targets))
    return made


def _said(rule: Rule, recipe: Recipe) -> list[Any]:
    source, target = single(rule)
    if source.axes == target.axes and not _gathered(source, target) and not _gathered(target, source):
        renames = [KeyRename(a.pieces, b.pieces) for a, b in expanded(source, target)]
        for one in renames:
            _check_plain((one.source, one.target))  # refused here, with its rule
        return renames
    conversions = [_conversion(a, b, recipe) for a, b in expanded(source, target)]
    for conversion in conversions:
        _check_plain((*conversion.sources, *conversion.targets))
        conversion.texts()
    return conversions


def _check_plain(sides: Sequence[Pieces]) -> None:
    """Refuse characters that the library reads as a part of a pattern."""
    for text in (p.text for pieces in sides for p in pieces if isinstance(p, Literal)):
        if not _PLAIN.fullmatch(text):
            raise NotSayable(f"a character in {text!r} that the library reads as a pattern")


def _gathered(one: RuleSide, other: RuleSide) -> list[Capture]:
    """The captures that only the first key has."""
    return [c for c in one.captures if c.name not in {o.name for o in other.captures}]


def _conversion(source: RuleSide, target: RuleSide, recipe: Recipe) -> KeyConversion:
    if source.axes is None or target.axes is None:
        raise NotSayable("tensors gathered or scattered without axes")
    gathered, scattered = _gathered(source, target), _gathered(target, source)
    steps = _operations(source, target, gathered, scattered, recipe)
    left = _apart(source, [c for c in gathered if c.choices])
    right = _apart(target, [c for c in scattered if c.choices])
    return KeyConversion(tuple(left), tuple(right), tuple(steps))


def _apart(side: RuleSide, choices: Sequence[Capture]) -> list[Pieces]:
    """The key of each choice."""
    found: list[Pieces] = [side.pieces]
    for capture in choices:
        found = [filled(pieces, capture.name, text) for pieces in found for text in capture.choices or ()]
    return found


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
