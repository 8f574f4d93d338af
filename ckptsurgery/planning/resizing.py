"""Recipes that bring tensors of another shape to the model's: the ops that fit by the shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import isqrt

from ..errors import Diagnostic, Remedy, literal
from ..language.covering import exact_patterns
from ..language.keys import escape
from ..ops.base import OpError
from ..ops.registry import make_op
from ..specs import TensorSpec
from .plan import Plan
from .steps import Step

__all__ = ["as_arguments", "recipe_of_changes", "resizing"]

Specs = Mapping[str, TensorSpec]
Call = tuple[str, tuple[object, ...], Mapping[str, object]]

_MOST_TOKENS = 8  # before the grid of a position table: class, distillation, registers
_MOST_HEADS = 64  # columns of a table of relative positions; an embedding has more


def resizing(
    plan: Plan, wrong: Specs, target: Specs, *, by_rules: bool
) -> tuple[tuple[Remedy, ...], tuple[Remedy, ...]]:
    """Return the remedies that bring tensors to the shapes that a target wants: certain ones, and those of rows.

    Args:
        plan: makes the tensors. wrong: target key -> spec of those whose shape differs.
        by_rules: whether the plan is made of rules that the caller wrote, which are changed in their place.
    """
    sure = {k: change for k, s in wrong.items() if (change := _certain(s, target[k])) is not None}
    rows = {k: change for k, s in wrong.items() if k not in sure and (change := _rows(s, target[k])) is not None}
    return _remedies(plan, sure, by_rules), _remedies(plan, rows, by_rules)


def _remedies(plan: Plan, changes: Mapping[str, tuple[str, str]], by_rules: bool) -> tuple[Remedy, ...]:
    if not changes:
        return ()
    effect = "resizes them" if all("|" in right for _, right in changes.values()) else "rearranges them"
    if not by_rules:
        return (recipe_of_changes(plan, changes, effect),)
    made: dict[int, list[str]] = {}
    for step in plan.steps:
        for key in step.targets:
            made.setdefault(step.rules[-1], []).append(key)
    found = []
    for number, keys in made.items():
        ways = {changes.get(key) for key in keys}
        use, right = plan.uses[number], next((w for w in ways if w), ("", ""))[1]
        if use.is_rest and any(w is not None for w in ways):
            found.append(Remedy("rules", _rules(plan, {k: changes[k] for k in keys if k in changes}), kind="recipe"))
        elif len(ways) == 1 and right.startswith(" |"):
            found.append(Remedy("rules", {use.text: f"{use.text}{right}"}, effect, kind="instead"))
    return tuple(found)


def as_arguments(problem: Diagnostic) -> Diagnostic:
    """The diagnostic for a caller without a recipe: what an entry of one would do, an argument of `load_into` does."""
    remedies = tuple(
        replace(r, kind="argument") if r.kind == "recipe" and r.argument in ("drop", "init") else r
        for r in problem.remedies
    )
    return problem if remedies == problem.remedies else replace(problem, remedies=remedies, help=None)


def recipe_of_changes(plan: Plan, changes: Mapping[str, tuple[str, str]], effect: str = "") -> Remedy:
    """The recipe that moves every tensor as a plan of renames does, and changes some on the way.

    Args:
        changes: target key -> what is written behind its source and behind itself, such as `(" [x y]", " [y x]")`.
    """
    others = [step for step in plan.steps if step.targets[0] not in changes]
    heads = [_heads(step) for step in others]
    usual = max({*heads}, key=heads.count, default=("", ""))
    odd = [s for s, head in zip(others, heads) if head != usual]
    rules = [*_rules(plan, changes), *(f"{escape(s.sources[0])} -> {escape(s.targets[0])}" for s in odd)]
    source, made = map(escape, usual)
    rest = "keep" if usual == ("", "") else f"{source}{{k...}} -> {made}{{k...}}"
    return Remedy("recipe", {"rules": rules, "rest": rest}, effect)


def _rules(plan: Plan, changes: Mapping[str, tuple[str, str]]) -> list[str]:
    alike: dict[tuple[tuple[str, str], tuple[str, str]], list[str]] = {}
    for step in plan.steps:
        if step.targets[0] in changes:
            alike.setdefault((changes[step.targets[0]], _heads(step)), []).append(step.sources[0])
    rules = []
    for ((left, right), (head, made)), sources in alike.items():
        for pattern in exact_patterns(sources, plan.source):
            rules.append(f"{pattern}{left} -> {escape(made)}{pattern.removeprefix(escape(head))}{right}")
    return rules


def _heads(step: Step) -> tuple[str, str]:
    """The prefixes by which the names of a source and of its target differ."""
    source, made = step.sources[0], step.targets[0]
    shared = 0
    while shared < min(len(source), len(made)) and source[-1 - shared] == made[-1 - shared]:
        shared += 1
    at = len(source) - shared
    while at and source[at - 1] != "." and at < len(source):
        at += 1
    return source[:at], made[: len(made) - (len(source) - at)]


def _certain(have: TensorSpec, want: TensorSpec) -> tuple[str, str] | None:
    """What fits one shape to the other, and hardly anything else would."""
    if len(have.shape) == 2 and have.shape[::-1] == want.shape:
        return " [x y]", " [y x]"
    return _first((*_kernels(have.shape, want.shape), *_positions(have.shape, want.shape)), have, want)


def _rows(have: TensorSpec, want: TensorSpec) -> tuple[str, str] | None:
    """More or fewer rows: a vocabulary or classes, which the shapes cannot tell apart."""
    return _first([("resize_rows", (want.shape[0],), {})] if want.shape else [], have, want)


def _first(calls: Iterable[Call], have: TensorSpec, want: TensorSpec) -> tuple[str, str] | None:
    for name, args, keywords in calls:
        try:
            op = make_op(name, args, dict(keywords))
            if op.infer((have,))[0].shape == want.shape:
                written = [*map(literal, args), *(f"{k}={literal(v)}" for k, v in keywords.items())]
                return "", f" | {name}({', '.join(written)})"
        except OpError:
            continue
    return None


def _kernels(have: tuple[int, ...], want: tuple[int, ...]) -> Iterator[Call]:
    if len(have) == len(want) == 4 and have[:1] + have[2:] == want[:1] + want[2:]:
        yield "adapt_input_conv", (want[1],), {}
    if len(have) == len(want) == 4 and have[:2] == want[:2]:
        yield "resize_patch_embed", (list(want[2:]),), {}


def _positions(have: tuple[int, ...], want: tuple[int, ...]) -> Iterator[Call]:
    if len(have) != len(want) or len(have) < 2 or have[:-2] != want[:-2] or have[-1] != want[-1]:
        return
    old, new = have[-2], want[-2]
    for extra in (0, 3) if len(have) == 2 and have[1] <= _MOST_HEADS else ():
        if _odd_square(old - extra) and _odd_square(new - extra):
            window = (isqrt(new - extra) + 1) // 2
            yield "resize_rel_pos_bias", (window,), {"extra": extra} if extra else {}
    for prefix in range(_MOST_TOKENS + 1):
        if _square(old - prefix) and _square(new - prefix):
            grid = [isqrt(new - prefix)] * 2
            yield "resize_pos_embed", (), {"grid": grid, **({"prefix": prefix} if prefix else {})}


def _square(number: int) -> bool:
    return number > 1 and isqrt(number) ** 2 == number


def _odd_square(number: int) -> bool:
    return _square(number) and number % 2 == 1
