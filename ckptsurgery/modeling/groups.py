"""Parameter groups for an optimizer: learning rates that decay by layer, and no weight decay where none belongs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, LoadError
from .places import Place, close_names, places, require_module
from .selectors import matching_modules, matching_names

if TYPE_CHECKING:
    from torch import nn

__all__ = ["param_groups"]

_WORDS = ("bias", "norm")


def param_groups(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    layer_decay: float = 0.75,
    weight_decay: float = 0.05,
    no_decay: str | Iterable[object] = "bias and norm",
    lr: float = 1e-3,
    first: Iterable[object] = (),
    last: Iterable[object] = (),
) -> list[dict[str, Any]]:
    """Return groups of a model's trainable parameters, ready for `torch.optim.AdamW(groups)`.

    >>> from torch import nn
    >>> blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "blocks": blocks, "head": nn.Linear(4, 2)})
    >>> for group in param_groups(model, layers="blocks.{i}", layer_decay=0.5, lr=0.1):
    ...     print(group["layer"], group["lr_scale"], group["lr"], group["weight_decay"], group["names"])
    0 0.125 0.0125 0.05 ['embed.weight']
    1 0.25 0.025 0.05 ['blocks.0.weight']
    1 0.25 0.025 0.0 ['blocks.0.bias']
    2 0.5 0.05 0.05 ['blocks.1.weight']
    2 0.5 0.05 0.0 ['blocks.1.bias']
    3 1.0 0.1 0.05 ['head.weight']
    3 1.0 0.1 0.0 ['head.bias']

    With n layers, what the model holds before the first of them is layer 0, the k-th is layer k, and what comes after
    the last is layer n + 1; what stands between two belongs to the later one. The learning rate is
    `lr * layer_decay ** (n + 1 - layer)`, as in the fine-tuning recipes of timm. Frozen parameters are left out, and a
    tied one counts once, by its first name.

    Args:
        layers: a pattern over module paths, such as `"stages.{s}.blocks.{b}"`, or several; they count in the order
            in which the model holds them. Without it there is one layer.
        layer_decay: the factor from a layer to the one before it.
        weight_decay: for the parameters that are not exempt.
        no_decay: what is exempt. `"bias"`: biases by name; `"norm"`: what a norm holds, and all vectors and scalars;
            both joined by `and`; `"none"`; or a list of what `select` takes. The names in the model's
            `no_weight_decay()` are exempt too, unless it is `"none"`.
        lr: the learning rate of the last layer; each group carries its own.
        first, last: what `select` takes, for what belongs to layer 0 or n + 1 although it stands elsewhere.

    Returns:
        Groups with `params`, `names`, `lr`, `lr_scale`, `weight_decay` and `layer`, from the first layer to the last.

    Raises:
        LoadError: a pattern that matches no module, a selector that matches nothing, or nothing to train.
    """
    require_module(model)
    trained = _trained(model)
    if not trained:
        raise LoadError(Diagnostic("nothing-to-train", "every parameter is frozen", help="select(model, …).unfreeze()"))
    count, layer_of = _layers(model, trained, layers, first, last)
    exempt = _exempt(model, trained, no_decay)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for place in trained:
        layer, free = layer_of[place.name], place.name in exempt
        scale = layer_decay ** (count + 1 - layer) if layers is not None else 1.0
        group = groups.setdefault(
            (layer, free),
            {
                "params": [],
                "names": [],
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": 0.0 if free else weight_decay,
                "layer": layer,
            },
        )
        group["params"].append(place.tensor)
        group["names"].append(place.name)
    return [groups[key] for key in sorted(groups)]


def _trained(model: nn.Module) -> list[Place]:
    """The first place of each trainable parameter."""
    seen: dict[int, Place] = {}
    for place in places(model):
        if not place.is_buffer and place.tensor.requires_grad:
            seen.setdefault(id(place.tensor), place)
    return list(seen.values())


def _layers(
    model: nn.Module,
    trained: Sequence[Place],
    layers: str | Sequence[str] | None,
    first: Iterable[object],
    last: Iterable[object],
) -> tuple[int, dict[str, int]]:
    """How many layers there are, and the layer of each name."""
    if layers is None:
        return 0, {place.name: 0 for place in trained}
    patterns = [layers] if isinstance(layers, str) else list(layers)
    numbers = _numbers(model, patterns)
    count = len(numbers)
    where = {path: number for number, path in enumerate(numbers, 1)}
    named = {p.name: _layer_by_path(p.name, where) for p in places(model)}
    layer_of = _fill_gaps(named, count)
    for selectors, layer in ((first, 0), (last, count + 1)):
        for selector in [selectors] if isinstance(selectors, str) else selectors:
            layer_of.update(dict.fromkeys(matching_names(model, selector), layer))
    return count, layer_of


def _numbers(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    matched: dict[str, nn.Module] = {}
    for pattern in patterns:
        found = matching_modules(model, pattern)
        if not found:
            near = close_names(pattern, [path for path, _ in model.named_modules() if path])
            raise LoadError(
                Diagnostic(
                    "no-layers",
                    f"no module path matches {pattern!r}",
                    facts=(("close", ", ".join(near)),) if near else (),
                    help='a pattern over module paths, such as layers="encoder.layer.{i}"',
                )
            )
        matched |= found
    order = [path for path, _ in model.named_modules() if path in matched]
    # A layer inside a layer would be counted twice: the outer one is meant.
    return [path for path in order if not any(path.startswith(other + ".") for other in order)]


def _layer_by_path(name: str, where: Mapping[str, int]) -> int | None:
    parts = name.split(".")
    return next((where[p] for n in range(len(parts)) if (p := ".".join(parts[:n])) in where), None)


def _fill_gaps(named: Mapping[str, int | None], count: int) -> dict[str, int]:
    """Names outside of the layers: before the first, the one that comes next, after the last."""
    filled: dict[str, int] = {}
    following = count + 1
    for name in reversed(list(named)):
        own = named[name]
        following = own if own is not None else following
        filled[name] = following
    started = False
    for name, own in named.items():
        started = started or own is not None
        if not started:
            filled[name] = 0
    return filled


def _exempt(model: nn.Module, trained: Sequence[Place], no_decay: str | Iterable[object]) -> set[str]:
    if no_decay == "none":
        return set()
    exempt = _declared_exempt(model, trained)
    words = [w.strip() for w in no_decay.split(" and ")] if isinstance(no_decay, str) else []
    if words and all(word in _WORDS for word in words):
        exempt |= {p.name for p in trained if ("bias" in words and _is_bias(p)) or ("norm" in words and _is_norm(p))}
        return exempt
    for selector in [no_decay] if isinstance(no_decay, str) else no_decay:
        exempt.update(matching_names(model, selector))
    return exempt


def _is_bias(place: Place) -> bool:
    return "bias" in place.leaf.split("_")


def _is_norm(place: Place) -> bool:
    return place.tensor.ndim <= 1 or "norm" in type(place.owner).__name__.lower()


def _declared_exempt(model: nn.Module, trained: Sequence[Place]) -> set[str]:
    """Names that the model's parts exempt by `no_weight_decay()`, and by a flag on the parameter."""
    exempt = {p.name for p in trained if getattr(p.tensor, "_no_weight_decay", False)}
    for path, module in model.named_modules():
        declared: Any = getattr(module, "no_weight_decay", None)
        if callable(declared):
            exempt |= {f"{path}.{name}".lstrip(".") for name in declared()}
    return exempt
