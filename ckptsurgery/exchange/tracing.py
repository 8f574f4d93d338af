"""Recipes from code: a function over state dicts is run on numbered tensors, and the recipe is read off what it gives.

Every element of every tensor has a number of its own, so the result shows where each came from. What is read off is
proved on the same numbers, and on those of other sizes where the caller gives some.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CkptSurgeryError, Diagnostic, RecipeError
from ..inference.suggesting import specs_of, suggest
from ..language.captures import escape
from ..language.folding import fold
from ..language.recipe import Recipe
from ..narrowing import present
from ..running.runner import plan
from ..specs import DTYPES, TensorSpec
from ..wording import counted
from .key_rules import KeyPair, generalised

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["trace"]

StateDict = dict[str, Any]
StateDictFunction = Callable[[StateDict], Any]
_EXACT = 1 << 24
"""Numbers below which float32 holds every integer."""


def trace(
    function: StateDictFunction,
    specs: Any,
    *,
    others: Sequence[Any] = (),
    config: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe off a function that turns one state dict into another, and prove it.

    >>> def convert(state):
    ...     return {f"blocks.{k.split('.')[1]}.qkv": torch.cat([v, state[k.replace("q", "k")]])
    ...             for k, v in state.items() if k.endswith("q")}
    >>> import torch
    >>> specs = {f"layers.{i}.{p}": TensorSpec((4, 3), "F32") for i in range(3) for p in "qk"}
    >>> print(trace(convert, specs).rules[0])
    layers.{i}.{p:q,k} [b c] -> blocks.{i}.qkv [(p b) c]

    The function must be pure and only rearrange: rename, split, join, stack, transpose. It gets small tensors of
    integers in float32 or float64, of the shapes in `specs`, and may not look at their values.

    Args:
        specs: what the function takes: `{key: TensorSpec}`, a model, or whatever `open` takes; of small sizes.
        others: further sizes on which the recipe must do the same: other depths, widths, numbers of experts.
        config: what `config.` means in the proof, for a recipe that asks for it.

    Returns:
        A recipe whose plan makes of every one of these what the function makes.

    Raises:
        RecipeError: the function changes values, makes tensors of its own, or does what no rule was found to say; the
            keys are named.
    """
    cases = [_numbered(specs_of(sizes)) for sizes in (specs, *others)]
    failed: RecipeError | None = None
    for numbered in cases:  # what one of the sizes hides, another may show
        try:
            made = _called(function, numbered)
            recipe = _read_off(numbered, made)
            problem = _problem(recipe, function, cases, config)
            if problem is not None and len(cases) > 1 and not recipe.stages:
                recipe = _by_numbers(recipe, numbered, made)
                problem = _problem(recipe, function, cases, config) and problem
            if problem is None:
                return recipe
            failed = failed or problem
        except RecipeError as error:
            failed = failed or error
    raise present(failed, "the reason why nothing was read off")


def _problem(
    recipe: Recipe, function: StateDictFunction, cases: Sequence[StateDict], config: Mapping[str, Any] | None
) -> RecipeError | None:
    """Why a recipe does not make of all sizes what the function makes; None where it does."""
    try:
        for case in cases:
            _prove(recipe, function, case, config)
    except RecipeError as error:
        return error
    return None


def _by_numbers(recipe: Recipe, numbered: StateDict, made: Mapping[str, Tensor]) -> Recipe:
    """The recipe with its renames read off anew: rules by the numbers in keys, which hold for other numbers as well."""
    import torch

    rearranging = [rule for rule in recipe.rules if any(t.axes is not None for t in (*rule.sources, *rule.targets))]
    taken = [term.pattern for rule in rearranging for term in rule.sources]
    owners = {float(tensor.flatten()[0]): key for key, tensor in numbered.items() if tensor.numel()}
    pairs = []
    for target, tensor in made.items():
        source = owners.get(float(tensor.flatten()[0])) if tensor.numel() else None
        if source is None or not torch.equal(numbered[source], tensor) or any(p.readings(source) for p in taken):
            continue
        pairs.append(KeyPair(escape(source), escape(target), (source,), (target,)))
    renamed = {pair.sources[0] for pair in pairs}
    rules = [f"? {left} -> {right}" for left, right, _ in generalised(pairs, set(numbered) - renamed)]
    texts = [*rules, *map(str, rearranging)]
    used = set(re.findall(r"\w+", " ".join(texts)))
    return Recipe(
        texts,
        drop=recipe.drop,
        dims={name: size for name, size in recipe.dims.items() if name in used},
        names={name: table for name, table in recipe.names.items() if f"{{{name}}}" in " ".join(texts)},
    )


def _numbered(specs: Mapping[str, TensorSpec]) -> StateDict:
    """Tensors of which no two elements are equal, and none is zero."""
    import torch

    total = sum(spec.numel for spec in specs.values())
    dtype = torch.float32 if total < _EXACT else torch.float64
    found: StateDict = {}
    at = 1
    for key, spec in specs.items():
        whole = DTYPES[spec.dtype].kind != "float"
        kind = torch.int64 if whole else dtype
        found[key] = torch.arange(at, at + spec.numel, dtype=kind).reshape(spec.shape)
        at += spec.numel
    return found


def _called(function: StateDictFunction, numbered: StateDict) -> dict[str, Tensor]:
    """What a function gives for numbered tensors, if it is made of them alone."""
    import torch

    given = {key: tensor.clone() for key, tensor in numbered.items()}
    try:
        result = function(given)
    except Exception as error:  # the function is the caller's, and may raise anything
        text = f"the function failed on numbered tensors: {type(error).__name__}: {error}"
        raise RecipeError(Diagnostic("not-traceable", text)) from error
    if not isinstance(result, Mapping):
        text = f"the function returned {type(result).__name__}, and a state dict is needed"
        raise RecipeError(Diagnostic("not-traceable", text))
    last = sum(tensor.numel() for tensor in numbered.values())
    made = {key: tensor.detach().clone() for key, tensor in result.items() if isinstance(tensor, torch.Tensor)}
    foreign = [k for k, t in made.items() if t.numel() and not _made_of_numbers(t, last)]
    if foreign:
        text = f"the function makes values of its own in {counted(len(foreign), 'tensor')}"
        notes = tuple(text for text, _ in fold(foreign)[:8])
        advice = "a recipe says it by an op, or by [init]"
        raise RecipeError(Diagnostic("not-traceable", text, notes=notes, advice=advice))
    return made


def _made_of_numbers(tensor: Tensor, last: int) -> bool:
    whole = tensor.double()
    return bool(((whole >= 1) & (whole <= last) & (whole == whole.round())).all())


def _read_off(numbered: StateDict, made: Mapping[str, Tensor]) -> Recipe:
    """The recipe between two sides: at once, or by way of the parts that targets are joined from."""
    found = suggest(numbered, dict(made), by="values")
    differing = [k for a in found.assumptions if a.kind == "values" for k in a.keys]
    if found.coverage == 1.0 and not differing:
        return found.recipe
    between = _parts(numbered, {k: made[k] for k in (*found.unmatched_target, *differing)})
    if between is not None:
        first = suggest(numbered, between, by="values")
        second = suggest(between, dict(made), by="values")
        if first.coverage == second.coverage == 1.0:
            return first.recipe.then(second.recipe)
    raise RecipeError(_unsaid([*found.unmatched_target, *differing]))


def _unsaid(keys: Sequence[str]) -> Diagnostic:
    return Diagnostic(
        "not-traceable",
        f"no rule was found that says what the function does to make {counted(len(keys), 'tensor')}",
        notes=tuple(text for text, _ in fold(list(keys))[:8]),
        advice="trace with sizes that differ from each other, or write these rules by hand",
    )


def _parts(numbered: StateDict, unread: Mapping[str, Tensor]) -> StateDict | None:
    """The source with those tensors rearranged that unread targets are joined from, each as it stands in its target."""
    import torch

    names = list(numbered)
    starts = torch.tensor([int(numbered[k].flatten()[0]) if numbered[k].numel() else 0 for k in names])
    between = dict(numbered)
    for target in unread.values():
        owner = torch.searchsorted(starts, target.long().contiguous(), right=True) - 1
        blocks = _blocks(owner)
        if blocks is None:
            return None
        dim, runs = blocks
        for number, start, size in runs:
            part = target.narrow(dim, start, size)
            if part.numel() != numbered[names[number]].numel():
                return None
            between[names[number]] = part.contiguous()
    return between


def _blocks(owner: Tensor) -> tuple[int, list[tuple[int, int, int]]] | None:
    """The dimension along which a tensor is joined, and its parts: (number of the source, start, size)."""
    for dim in range(owner.dim()):
        rows = owner.movedim(dim, 0).reshape(owner.shape[dim], -1)
        if not bool((rows == rows[:, :1]).all()):
            continue
        runs: list[tuple[int, int, int]] = []
        for at, number in enumerate(rows[:, 0].tolist()):
            if runs and runs[-1][0] == number:
                runs[-1] = number, runs[-1][1], runs[-1][2] + 1
            else:
                runs.append((number, at, 1))
        if len({number for number, _, _ in runs}) == len(runs):
            return dim, runs
    return None


def _prove(
    recipe: Recipe,
    function: StateDictFunction,
    numbered: StateDict,
    config: Mapping[str, Any] | None,
) -> None:
    """Check that the plan of a recipe makes what the function does, element by element."""
    made = _called(function, numbered)
    specs = {k: TensorSpec(tuple(t.shape), t.dtype) for k, t in made.items()}
    try:
        result = plan(numbered, recipe, target=specs, dtype="model", config=config).state_dict()
    except CkptSurgeryError as error:
        text = "the recipe that was read off does not fit these sizes"
        raise RecipeError([Diagnostic("not-traceable", text), *error.diagnostics]) from error
    wrong = [k for k, t in made.items() if k not in result or not bool((result[k] == t).all())]
    if wrong:
        raise RecipeError(_unsaid(wrong))
