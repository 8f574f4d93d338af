"""Recipes as the tables of two frameworks that know names and little more: vLLM's mapper, and Paddle's AOA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..errors import Diagnostic, RecipeError
from ..language.captures import Capture, Literal
from ..language.recipe import Recipe
from ..language.rules import Rule
from .conversion_axes import NotSayable
from .exporting import Side, each_rule, expanded, single, spelled_choices

__all__ = ["to_paddle", "to_vllm"]

Pieces = tuple[Literal | Capture, ...]
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
    kinds: dict[str, dict[str, str | None]] = {}
    for kind, old, new in [one for listed in each_rule(recipe, _VLLM, _mapped) for one in listed]:
        kinds.setdefault(kind, {})[old] = new
    for text in recipe.drop:
        kind, old = _dropped(text)
        kinds.setdefault(kind, {})[old] = None
    _refuse_chains(kinds)
    return {kind: kinds[kind] for kind in sorted(kinds)}


def _mapped(rule: Rule, recipe: Recipe) -> list[tuple[str, str, str | None]]:
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
    return f"orig_to_new_{'substr' if start and end else 'suffix' if start else 'prefix'}", old, new


def _open(source: Pieces, target: Pieces, at: int) -> bool:
    """Whether both keys have the same capture of whole segments at an end."""
    if len(source) < 2 or len(target) < 2:
        return False
    a, b = source[at], target[at]
    return isinstance(a, Capture) and isinstance(b, Capture) and a.rest and a.name == b.name


def _dropped(text: str) -> tuple[str, str]:
    from ..language.rules import parse_pattern

    pieces = parse_pattern(text)[1].pieces
    kind, old, _ = _place(tuple(pieces), tuple(pieces))
    return kind, old


def _refuse_chains(kinds: Mapping[str, Mapping[str, str | None]]) -> None:
    """The mapper applies each of its entries to what the one before made."""
    problems = []
    for kind, table in kinds.items():
        test = {"substr": "__contains__", "prefix": "startswith", "suffix": "endswith"}[kind.rpartition("_")[2]]
        for old, new in table.items():
            for other in table:
                if new is not None and other != old and getattr(new, test)(other):
                    text = f"{_VLLM} cannot say {old!r} -> {new!r}: its result would be renamed again, by {other!r}"
                    problems.append(Diagnostic("not-exportable", text))
    if problems:
        raise RecipeError(problems)


def to_paddle(recipe: Recipe) -> dict[str, list[str]]:
    """Return a recipe as Paddle's AOA statements, the value of `aoa_config`.

    >>> rule = "h.{i}.{p:q,k}.weight [d x] -> layers.{i}.qk.weight [(p d) x]"
    >>> to_paddle(Recipe([rule, "wte.weight [v d] -> embed.weight [d v]"], rest="keep"))["aoa_statements"]
    ['h.$LAYER_ID.q.weight, h.$LAYER_ID.k.weight -> layers.$LAYER_ID.qk.weight, axis=0', 'wte.weight^T -> embed.weight']

    It knows names with a layer's number, transposed matrices, tensors joined along an axis, and tensors cut into equal
    parts.

    Raises:
        RecipeError: every rule that a statement cannot say, with the reason.
    """
    if recipe.drop:
        text = f"{_AOA} cannot say drop = {list(recipe.drop)}: leave these out of the target"
        raise RecipeError(Diagnostic("not-exportable", text))
    return {"aoa_statements": [one for listed in each_rule(recipe, _AOA, _statements) for one in listed]}


def _statements(rule: Rule, recipe: Recipe) -> list[str]:
    source, target = single(rule)
    return [text for a, b in expanded(source, target) for text in _statement(a, b)]


def _statement(source: Side, target: Side) -> Iterator[str]:
    left, right = ({c.name for c in side.captures} for side in (source, target))
    gathered, scattered = [*(left - right)], [*(right - left)]
    if not gathered and not scattered:
        before, after = source.axes or (), target.axes or ()
        turned = len(before) == 2 and before == after[::-1] and before != after
        if before != after and not turned:
            raise NotSayable("a rearrangement that is not the transpose of a matrix")
        yield f"{_name(source.pieces)}{'^T' if turned else ''} -> {_name(target.pieces)}"
        return
    if len(gathered) + len(scattered) != 1:
        raise NotSayable("more than one list at once")
    name = (gathered or scattered)[0]
    one, many = (target, source) if gathered else (source, target)
    axis = next((n for n, d in enumerate(one.axes or ()) if d[:1] == (name,) and len(d) == 2), None)
    whole = [d if n != axis else d[1:] for n, d in enumerate(one.axes or ())]
    if axis is None or whole != list(many.axes or ()):
        raise NotSayable("parts that are not joined or cut one after another")
    if scattered and any(":" in n for d in whole for n in d):
        raise NotSayable("a cut into unequal parts")
    if not any(c.name == name and c.choices for c in many.captures):
        raise NotSayable("a list without names of its own")
    keys = ", ".join(_name(a.pieces) for a, _ in spelled_choices(many, many, [name]))
    yield f"{keys} -> {_name(one.pieces)}, axis={axis}" if gathered else f"{_name(one.pieces)} -> {keys}, axis={axis}"


def _name(pieces: Sequence[Literal | Capture]) -> str:
    """A key with the macros of AOA in the place of numbers."""
    macros = iter(_MACROS)
    used: dict[str, str] = {}
    found = []
    for piece in pieces:
        if isinstance(piece, Literal):
            found.append(piece.text)
            continue
        if piece.rest or piece.choices:
            raise NotSayable(f"the capture {{{piece}}}")
        if piece.name not in used:
            used[piece.name] = next(macros, "")
        if not used[piece.name]:
            raise NotSayable("more than two numbers in a key")
        found.append(used[piece.name])
    return "".join(found)
