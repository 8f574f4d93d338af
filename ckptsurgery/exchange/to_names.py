"""Recipes as the tables of two frameworks that know names and little more: vLLM's mapper, and Paddle's AOA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ..errors import Diagnostic, RecipeError
from ..language.captures import Capture, Literal
from ..language.recipe import Recipe
from ..language.rules import Rule, parse_pattern
from .conversion_axes import NotSayable
from .exporting import RuleSide, each_rule, each_target, expanded, single, spelled_choices

__all__ = ["to_paddle", "to_vllm"]

Pieces = tuple[Literal | Capture, ...]
Axes = tuple[tuple[str, ...], ...] | None
Renaming = tuple[str, str, str | None]
"""Where in a key a text is replaced, the text, and what replaces it; None where the key is left out."""
_KINDS = ("substr", "prefix", "suffix")
_AOA_NAME = re.compile(r"[A-Za-z_][A-Za-z.$_*0-9]*")
_VLLM = "vLLM's WeightsMapper"
_AOA = "an AOA statement"
_MACROS = ("$LAYER_ID", "$EXPERT_ID")


def to_vllm(recipe: Recipe) -> dict[str, dict[str, str | None]]:
    """Return a recipe of renames as the arguments of vLLM's `WeightsMapper`.

    >>> rules = ["lm.{s...} -> model.{s...}", "{r...}.gamma -> {r...}.weight"]
    >>> to_vllm(Recipe(rules, drop=["rope.{s...}"], rest="keep"))
    {'orig_to_new_prefix': {'lm.': 'model.', 'rope.': None}, 'orig_to_new_suffix': {'.gamma': '.weight'}}

    `WeightsMapper(**cs.recipes.to_vllm(recipe))` then maps names as the recipe does.

    Raises:
        RecipeError: every rule that is no rename of a beginning, an end, or a part in between, with the reason.
    """
    entries = [one for listed in each_rule(recipe, _VLLM, _mapped) for one in listed]
    entries += map(_dropped, recipe.drop)
    kinds: dict[str, dict[str, str | None]] = {}
    for kind, old, new in _in_order(entries):
        kinds.setdefault(f"orig_to_new_{kind}", {})[old] = new
    return {kind: kinds[kind] for kind in sorted(kinds)}


def _mapped(rule: Rule, recipe: Recipe) -> list[Renaming]:
    source, target = single(rule)
    if source.axes != target.axes:
        raise NotSayable("it changes tensors, and the mapper only names")
    return [_place(a.pieces, b.pieces) for a, b in expanded(source, target)]


def _place(source: Pieces, target: Pieces) -> tuple[str, str, str]:
    start, end = _open(source, target, 0), _open(source, target, -1)
    source, target = (p[start : len(p) - end] for p in (source, target))
    if any(isinstance(p, Capture) for p in (*source, *target)) or not (start or end):
        raise NotSayable("only a beginning, an end or a part in between of any key is renamed there")
    old, new = ("".join(str(p.text) for p in side if isinstance(p, Literal)) for side in (source, target))
    return "substr" if start and end else "suffix" if start else "prefix", old, new


def _open(source: Pieces, target: Pieces, at: int) -> bool:
    """Whether both keys have the same capture of whole segments at an end, and not both nothing else."""
    if len(source) + len(target) < 3:
        return False
    a, b = source[at], target[at]
    return isinstance(a, Capture) and isinstance(b, Capture) and a.rest and a.name == b.name


def _dropped(text: str) -> Renaming:
    pieces = tuple(parse_pattern(text)[1].pieces)
    try:
        kind, old, _ = _place(pieces, pieces)
    except NotSayable as reason:
        raise RecipeError(Diagnostic("not-exportable", f"{_VLLM} cannot say drop = [{text!r}]: {reason}")) from None
    return kind, old, None


def _in_order(entries: Sequence[Renaming]) -> list[Renaming]:
    """Entries in an order in which none renames what one before it made.

    The mapper applies them one after another: parts in between first, then beginnings, then ends.

    Raises:
        RecipeError: there is no such order.
    """
    left, found = list(entries), list[Renaming]()
    while left:
        # An entry comes next if no entry of its kind that is still to come renames its result.
        free = [a for a in left if not any(b != a and b[0] == a[0] and _again(a, b) for b in left)]
        if not free:
            break
        found.append(free[0])
        left.remove(free[0])
    found.sort(key=lambda entry: _KINDS.index(entry[0]))
    again = [(a, b) for n, a in enumerate(found) for b in found[n + 1 :] if _again(a, b)]
    if left or again:
        pairs = again or [(a, b) for a in left for b in left if a != b and _again(a, b)]
        raise RecipeError([_chain(a, b) for a, b in pairs])
    return found


def _chain(first: Renaming, second: Renaming) -> Diagnostic:
    text = f"{_VLLM} cannot say {first[1]!r} -> {first[2]!r}: its result would be renamed again, by {second[1]!r}"
    return Diagnostic("not-exportable", text)


def _again(first: Renaming, second: Renaming) -> bool:
    """Whether the second entry would rename a key that the first one made, and not the key that it was made from."""
    (kind, old, new), (other_kind, other, _) = first, second
    if new is None:
        return False
    if kind == other_kind == "prefix":
        return _meet(new, other) and not _meet(old, other)
    if kind == other_kind == "suffix":
        return _meet(new[::-1], other[::-1]) and not _meet(old[::-1], other[::-1])
    if other in new and other not in old:
        return True
    for count in range(1, min(len(new), len(other)) + 1):
        head, tail = other[:count], other[-count:]
        if (new.endswith(head) and not old.endswith(head)) or (new.startswith(tail) and not old.startswith(tail)):
            return True
    return False


def _meet(one: str, other: str) -> bool:
    """Whether a text may begin with both."""
    return one.startswith(other) or other.startswith(one)


def to_paddle(recipe: Recipe) -> dict[str, list[str]]:
    """Return a recipe as Paddle's AOA statements, the value of `aoa_config`.

    >>> rule = "h.{i}.{p:q,k}.weight [d x] -> layers.{i}.qk.weight [(p d) x]"
    >>> to_paddle(Recipe([rule, "wte.weight [v d] -> embed.weight [d v]"], rest="keep"))["aoa_statements"]
    ['h.$LAYER_ID.q.weight, h.$LAYER_ID.k.weight -> layers.$LAYER_ID.qk.weight, axis=0', 'wte.weight^T -> embed.weight']

    It knows names with a layer's and an expert's number, permuted dimensions, tensors joined along an axis, tensors
    cut into equal parts, and single names that are left out. Keys that no statement names keep theirs.

    Raises:
        RecipeError: every rule that a statement cannot say, with the reason.
    """
    problems: list[Diagnostic] = []
    dropped: list[str] = []
    for text in recipe.drop:
        try:
            dropped.append(_dropped_there(parse_pattern(text)[1].pieces))
        except NotSayable as reason:
            problems.append(Diagnostic("not-exportable", f"{_AOA} cannot say drop = [{text!r}]: {reason}"))
    if problems:
        raise RecipeError(problems)
    return {"aoa_statements": [one for listed in each_rule(recipe, _AOA, _statements) for one in listed] + dropped}


def _statements(rule: Rule, recipe: Recipe) -> list[str]:
    pairs = (pair for source, target in each_target(rule) for pair in expanded(source, target))
    return [text for a, b in pairs for text in _statement(a, b)]


def _statement(source: RuleSide, target: RuleSide) -> Iterator[str]:
    left, right = ({c.name: c for c in side.captures} for side in (source, target))
    gathered, scattered = [n for n in left if n not in right], [n for n in right if n not in left]
    macros: dict[str, str] = {}
    if not gathered and not scattered:
        name, order = _name(source.pieces, macros), _permutation(source.axes, target.axes)
        turned = order == [1, 0]
        permuted = f', permute = "{order}"' if order is not None and not turned else ""
        yield f"{name}{'^T' if turned else ''} -> {_name(target.pieces, macros)}{permuted}"
        return
    if len(gathered) + len(scattered) != 1:
        raise NotSayable("more than one list at once")
    name = (gathered or scattered)[0]
    one, many = (target, source) if gathered else (source, target)
    axis = next((n for n, d in enumerate(one.axes or ()) if d[:1] == (name,) and len(d) == 2), None)
    whole = [d if n != axis else d[1:] for n, d in enumerate(one.axes or ())]
    if axis is None or whole != list(many.axes or ()) or ("...",) in whole[:axis]:
        raise NotSayable("parts that are not joined or cut one after another")
    if scattered and any(":" in n for d in whole for n in d):
        raise NotSayable("a cut into unequal parts")
    if any(c.name == name and c.choices for c in many.captures):
        parts = ", ".join(_name(a.pieces, macros) for a, _ in spelled_choices(many, many, [name]))
    elif gathered:
        if len(left) > 1:  # the macros are expanded first, and match no name with a star
            raise NotSayable("a list without names of its own beside another number")
        parts = _name(many.pieces, {name: "*"})
    else:
        raise NotSayable("a list without names of its own")
    whole_name = _name(one.pieces, macros)
    yield f"{parts} -> {whole_name}, axis={axis}" if gathered else f"{whole_name} -> {parts}, axis={axis}"


def _dropped_there(pieces: Iterable[Literal | Capture]) -> str:
    """The statement that leaves a name out; all names of a statement with a macro must have it, and `_` has none."""
    macros: dict[str, str] = {}
    name = _name(pieces, macros)
    if macros:
        raise NotSayable("a number in a name that is left out")
    return f"{name} -> _"


def _permutation(before: Axes, after: Axes) -> list[int] | None:
    """Where each dimension of the result comes from; None where all stay."""
    if before == after:
        return None
    if before is None or after is None or sorted(before) != sorted(after) or ("...",) in before:
        raise NotSayable("a rearrangement that is not a permutation of all dimensions")
    return [before.index(dim) for dim in after]


def _name(pieces: Iterable[Literal | Capture], macros: dict[str, str]) -> str:
    """A key with the macros of AOA in the place of numbers.

    Args:
        macros: those of captures that stand elsewhere in the statement; new ones are put in.
    """
    found = []
    for piece in pieces:
        if isinstance(piece, Literal):
            found.append(piece.text)
            continue
        if piece.rest or piece.choices:
            raise NotSayable(f"the capture {{{piece}}}")
        if piece.name not in macros:
            free = [macro for macro in _MACROS if macro not in macros.values()]
            if not free:
                raise NotSayable("more than two numbers in a key")
            macros[piece.name] = free[0]
        found.append(macros[piece.name])
    text = "".join(found)
    if not _AOA_NAME.fullmatch(text):
        raise NotSayable(f"{text!r} is not a name there: letters, digits, dots and underscores are")
    return text
