"""Matrices that are stored the other way round though names and shapes fit: other evidence has to show it.

Square ones: either the matrices beside them that are not square had to be transposed, all of them; or the source is a
live module, and its layer computes x @ W where the model's computes x @ W.T. And those of a file of Paddle's, whose
Linear layers keep [in, out]; the file's own marks show that, so its layout is never guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, Remedy
from ..language.folding import fold
from ..language.patterns import patterns_of
from ..modeling.places import Place, places
from ..planning.plan import Plan
from ..planning.resizing import recipe_of_changes
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["as_if_transposed", "foreign_layout", "live_modules", "transposed", "turned_weights"]

Specs = Mapping[str, TensorSpec]


def live_modules(source: Any, subtree: str | None = None) -> dict[str, nn.Module]:
    """The modules of a source that is a live one, or several under prefixes, by their path in its keys."""
    from torch import nn

    if isinstance(source, nn.Module):
        before = f"{subtree}." if subtree else ""
        return {p[len(before) :]: m for p, m in source.named_modules() if p.startswith(before) or not before}
    if isinstance(source, Mapping) and not subtree:
        mounts = {k: m for k, m in source.items() if isinstance(m, nn.Module) and isinstance(k, str)}
        return {f"{k}{p}".removesuffix("."): m for k, mount in mounts.items() for p, m in mount.named_modules()}
    return {}


def turned_weights(
    model: nn.Module, made: Specs, target: Specs, origins: Mapping[str, tuple[str, ...]], live: Mapping[str, nn.Module]
) -> tuple[dict[str, str], list[str]]:
    """Square matrices that the source holds transposed, each with how that shows; and those that shape gives away.

    Args:
        made: what the source offers, by the model's keys. origins: the source keys behind each.
        live: the source's modules by path, where it is a live one.
    """
    matrices = [p for p in places(model) if not p.is_buffer and p.tensor.ndim == 2]
    pairs = {p.name: (made[p.name].shape, target[p.name].shape) for p in matrices if {p.name} <= made.keys()}
    kinds: dict[tuple[type, str], list[str]] = {}
    for place in matrices:
        theirs = [live.get(o.rpartition(".")[0]) for o in origins.get(place.name, ())]
        if place.name in pairs and type(place.owner) not in map(type, theirs):  # the same type has the same layout
            kinds.setdefault((type(place.owner), place.leaf), []).append(place.name)
    squares: dict[str, str] = {}
    across: list[str] = []
    for names in kinds.values():
        uneven = [n for n in names if len(set(pairs[n][1])) == 2]
        if uneven and all(pairs[n][0] == pairs[n][1][::-1] for n in uneven):
            across += uneven
            why = f"square, and the source holds {uneven[0]!r} beside it transposed"
            squares |= {n: why for n in names if n not in uneven and pairs[n][0] == pairs[n][1]}
    for place in matrices if live else ():
        have, want = pairs.get(place.name, ((), ()))
        if place.name not in squares and have == want and len(set(want)) == 1 and want != (1, 1):
            differs = _differs(place, origins.get(place.name, ()), live)
            if differs:
                squares[place.name] = differs
    return squares, across


def transposed(squares: Mapping[str, str], across: Iterable[str], known: Iterable[str]) -> Diagnostic:
    """The problem of square matrices that would come in as they are, with the rules that turn them and their like."""
    every = patterns_of([*across, *squares], known)
    rules = [f"{p} [x y] -> {p} [y x]" for p in every]
    verb = "square matrix" if len(squares) == 1 else "square matrices"
    return Diagnostic(
        "transposed-square",
        f"{len(squares)} {verb} would load untransposed: the shapes fit, the layouts differ",
        notes=tuple(f"{text}: {squares[first]}" for text, first in _shown(squares)),
        facts=(("as they are", 'a recipe of rest "keep" alone, should the source hold [out, in] all the same'),),
        remedies=(Remedy("recipe", {"rules": rules, "rest": "keep"}),),
    )


def _shown(squares: Mapping[str, str]) -> list[tuple[str, str]]:
    by_reason: dict[str, list[str]] = {}
    for key, why in squares.items():
        by_reason.setdefault(why, []).append(key)
    return [(text, keys[0]) for keys in list(by_reason.values())[:8] for text, _ in fold(keys)[:4]]


def _differs(place: Place, sources: tuple[str, ...], live: Mapping[str, nn.Module]) -> str | None:
    """Whether the source's layer multiplies by a matrix from the other side than the model's; said if so."""
    path, _, leaf = sources[0].rpartition(".") if len(sources) == 1 else ("", "", "")
    theirs = live.get(path)
    if theirs is None or type(theirs) is type(place.owner):
        return None
    weight = theirs._parameters.get(leaf)
    left = None if weight is None else _from_the_left(theirs, weight)
    here = _from_the_left(place.owner, place.tensor)
    if left is None or here is None or left == here:
        return None
    one, other = ("x @ W", "x @ W.T")[:: 1 if left else -1]
    return f"{type(theirs).__name__} computes {one}, and {type(place.owner).__name__} {other}"


def _from_the_left(layer: nn.Module, weight: Tensor) -> bool | None:
    """Whether a layer computes x @ W (True) or x @ W.T (False), tried on one row; None where neither shows.

    Only a layer without parts of its own is tried. Its forward is called without its hooks, without gradients, and
    with the random state put back.
    """
    import torch
    from torch import nn

    if type(layer) is nn.Linear:
        return False  # whatever device it is on
    if weight.is_meta or not weight.is_floating_point() or any(layer.children()):
        return None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            row = torch.linspace(-1, 1, weight.shape[0], dtype=weight.dtype, device=weight.device)[None]
            made = layer.forward(row) - layer.forward(torch.zeros_like(row))
            near = [bool(torch.allclose(made, row @ w, rtol=1e-2, atol=1e-4)) for w in (weight, weight.T)]
    except Exception:  # it takes something else than a row, or is no product: nothing is shown
        return None
    return near[0] if near[0] != near[1] else None


_MARK, _SUFFIX = "StructuredToParameterName@@", ".pdparams"


def foreign_layout(weights: Collection[str], plan: Plan, loaded: Collection[str]) -> list[Diagnostic]:
    """Refuse a file of Paddle's as it is: its Linear weights are [in, out], and a square one fits.

    Args:
        weights: as `crossed_weights` returns.
        plan: the load without a rule. loaded: the model's keys that it would fill.
    """
    crossed = [key for key in loaded if key in weights]
    if not crossed:
        return []
    return [
        Diagnostic(
            "paddle-layout",
            f"{len(crossed)} weights of Linear layers would load as they are, and Paddle keeps them as [in, out]",
            notes=tuple(text for text, _ in fold(crossed)),
            facts=(("as they are", 'recipe=cs.Recipe(rest="keep"), should the file hold [out, in] all the same'),),
            remedies=(recipe_of_changes(plan, dict.fromkeys(crossed, (" [i o]", " [o i]"))),),
        )
    ]


def as_if_transposed(weights: set[str], plan: Plan, target: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the specs with those of crossed weights as the model has them: their layout is told, not their shape."""
    made = plan.specs
    crossed = {k for k in weights & made.keys() & target.keys() if made[k].shape[::-1] == target[k].shape}
    return {k: replace(s, shape=target[k].shape) if k in crossed else s for k, s in made.items()}


def crossed_weights(model: nn.Module, checkpoint: Checkpoint) -> set[str]:
    """Return the weights of Linear layers, where the source is a file of Paddle's; it keeps them as [in, out]."""
    from torch import nn

    if _MARK not in checkpoint.extras and not checkpoint.source.endswith(_SUFFIX):
        return set()
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and (module.in_features, module.out_features) != (1, 1)
    }
