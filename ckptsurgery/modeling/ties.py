"""Ties: several names for one tensor. Found, made, undone, recorded before a change and restored after it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic, LoadError, Remedy, literal
from ..specs import Tie
from ..storage.plain_memory import oddity, plain
from .assigning import parameter_like
from .places import Place, named_tensors, place_of, places, places_of, require_module

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["equal_bytes", "find_ties", "restore_ties", "tie", "untie"]


def find_ties(model: nn.Module) -> tuple[Tie, ...]:
    """The tie groups of a model, in state_dict order.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    >>> model[1].weight = model[0].weight
    >>> find_ties(model)
    (<Tie 0.weight, 1.weight: object>,)

    Disjoint or overlapping views of one storage are no ties. A class's `_tied_weights_keys` counts only when its
    config's `tie_word_embeddings` is true, and only where the tensors are not tied already. Meta models too.
    """
    require_module(model)
    by_object: dict[int, list[str]] = {}
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        by_object.setdefault(id(tensor), []).append(name)
    by_storage: dict[object, list[list[str]]] = {}
    for names in by_object.values():
        by_storage.setdefault(_identity(tensors[names[0]]), []).append(names)
    order = {name: at for at, name in enumerate(tensors)}
    groups = []
    for objects in by_storage.values():
        names = sorted(itertools.chain.from_iterable(objects), key=order.__getitem__)
        groups.append(Tie(tuple(names), "object" if len(objects) == 1 else "storage"))
    real = [g for g in groups if len(g.names) > 1]
    declared = _declared_groups(model, tensors, real)
    inside = {n for g in declared for n in g.names}
    real = [g for g in real if not inside.issuperset(g.names)]
    return tuple(sorted([*real, *declared], key=lambda g: order[g.names[0]]))


def _identity(tensor: Tensor) -> object:
    """What two tensors over the same bytes, seen in the same way, have in common; unique where that cannot be told."""
    if oddity(tensor) is not None or tensor.numel() == 0:
        return id(tensor)
    storage = tensor.untyped_storage()
    # Meta storages all lie at address 0: there the storage object itself is compared.
    address = storage._cdata if tensor.is_meta else storage.data_ptr()
    if address == 0:  # a backend that keeps its memory elsewhere
        return id(tensor)
    layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    return (tensor.device, address, tensor.dtype, *layout)


def _declared_groups(model: nn.Module, tensors: dict[str, Tensor], real: Sequence[Tie]) -> list[Tie]:
    """Groups that a declaration adds to: the declared names with all names that are tied to them already."""
    joined: dict[str, set[str]] = {}
    for group in real:
        members = set(group.names)
        joined.update(dict.fromkeys(group.names, members))
    grown: list[set[str]] = []
    for alias, source in _declarations(model, tensors):
        left, right = joined.get(alias, {alias}), joined.get(source, {source})
        if left is not right and tensors[alias].shape == tensors[source].shape:
            members = left | right
            joined.update(dict.fromkeys(members, members))
            grown = [g for g in grown if not g & members] + [members]
    return [Tie(tuple(n for n in tensors if n in members), "declared") for members in grown]


def _declarations(model: nn.Module, tensors: dict[str, Tensor]) -> Iterable[tuple[str, str]]:
    """`(alias, source)` pairs that `_tied_weights_keys` of the model and its parts declare, where they are in force."""
    for path, module in model.named_modules(remove_duplicate=False):
        declared = getattr(module, "_tied_weights_keys", None)
        if not declared or not getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            continue
        prefix = path + "." if path else ""
        local = [n.removeprefix(prefix) for n in tensors if n.startswith(prefix)]
        if isinstance(declared, dict):
            # An alias of several entries has the source of the last one, as in the library.
            pairs = list(dict(p for alias, source in declared.items() for p in _expand(alias, source, local)).items())
        else:
            pairs = _to_input_embedding(module, declared, local)
        yield from ((prefix + alias, prefix + source) for alias, source in pairs)


def _expand(alias: str, source: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """One entry of a declaration: two names, or two regular expressions searched from the start of each name."""
    if alias in names and source in names:
        return [(alias, source)]
    aliases, sources = (sorted(n for n in names if re.search("^" + text, n)) for text in (alias, source))
    return [(a, s) for a, s in zip(aliases, itertools.cycle(sources)) if a != s] if sources else []


def _to_input_embedding(module: nn.Module, declared: Iterable[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """A declaration that lists the aliases alone means the input embedding's weight."""
    getter: Any = getattr(module, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    weight = getattr(embedding, "weight", None)
    sources = [p.name for p in places_of(module, weight)] if weight is not None else []
    if not sources:
        return []
    return [(n, sources[0]) for n in names if n not in sources and any(re.search(text, n) for text in declared)]


def tie(model: nn.Module, name: str, to: str) -> Tie:
    """Make `name` the very tensor that `to` is, and return the group.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    >>> print(tie(model, "1.weight", to="0.weight"))
    0.weight = 1.weight (object)
    >>> model[1].weight is model[0].weight
    True

    Raises:
        LoadError: unknown name, another shape, dtype or device, a buffer against a parameter, or a tensor that a
            parametrization or a quantised module computes.
    """
    require_module(model)
    alias, source = place_of(model, name), place_of(model, to)
    _tieable(alias, source, ("shapes", "dtypes", "devices", "kinds", "tensor types"))
    if alias.tensor is not source.tensor:
        alias.put(source.tensor)
    return _proved(model, (to, name))


def _tieable(alias: Place, source: Place, aspects: Collection[str]) -> None:
    mine, other = alias.tensor, source.tensor
    differing = [
        f"{what} {a} and {b}"
        for what, a, b in (
            ("shapes", list(mine.shape), list(other.shape)),
            ("dtypes", mine.dtype, other.dtype),
            ("devices", mine.device, other.device),
            ("kinds", *("buffer" if p.is_buffer else "parameter" for p in (alias, source))),
            ("tensor types", *(type(t).__name__ for t in (mine, other))),
        )
        if a != b and what in aspects
    ]
    if differing:
        raise LoadError(
            Diagnostic("cannot-tie", f"{alias.name!r} cannot be tied to {source.name!r}: {', '.join(differing)}")
        )


def _proved(model: nn.Module, names: Sequence[str]) -> Tie:
    """The object group of these names, each looked up again and compared by `is`."""
    tensor = place_of(model, names[0]).tensor
    group = tuple(p.name for p in places_of(model, tensor))
    lost = [n for n in names if n not in group]
    if lost:
        raise LoadError(
            Diagnostic(
                "tie-lost",
                f"{', '.join(map(repr, lost))} did not become {names[0]!r}",
                help="does the module replace what is assigned to it?",
            )
        )
    return Tie(group, "object")


def untie(model: nn.Module, name: str) -> None:
    """Give `name` a copy of its own, equal in value, of the same class and `requires_grad`.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    >>> _ = tie(model, "1.weight", to="0.weight")
    >>> untie(model, "1.weight")
    >>> find_ties(model)
    ()

    Raises:
        LoadError: the name is not tied, or it is tied because whole modules are shared.
    """
    require_module(model)
    place = place_of(model, name)
    groups = [g for g in find_ties(model) if name in g.names and g.kind != "declared"]
    if not groups:
        raise LoadError(Diagnostic("not-tied", f"{name!r} is tied to nothing", help="ties(model) lists the groups"))
    same = [p.name for p in places(model) if p.owner is place.owner and p.leaf == place.leaf and p.name != name]
    if same:
        raise LoadError(
            Diagnostic(
                "shared-module",
                f"{name!r} and {same[0]!r} are one tensor because their module is one object",
                help=f"give the model a copy.deepcopy of the module at {name.rpartition('.')[0]!r} first",
            )
        )
    old = place.tensor
    copy = old.detach().clone()
    place.put(copy if place.is_buffer else parameter_like(old, copy))


def restore_ties(
    model: nn.Module, groups: Iterable[Tie], prefer: Collection[str] = (), check_values: bool = True
) -> tuple[Tie, ...]:
    """Tie the names of each recorded group again, and prove it.

    >>> import torch
    >>> with torch.device("meta"):
    ...     model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    >>> groups = (tie(model, "1.weight", to="0.weight"),)
    >>> _ = model.to_empty(device="cpu")
    >>> model[1].weight is model[0].weight
    False
    >>> _ = restore_ties(model, groups, check_values=False)
    >>> model[1].weight is model[0].weight
    True

    The group takes the tensor of a name in `prefer`, or of its first name that is not meta. Where a name is
    parametrised by now, its single original is meant.

    Args:
        prefer: names that hold the values wanted.
        check_values: whether names of one group must hold equal bytes; only after `to_empty`, where they hold none, is
            there a reason to say no. Names outside of `prefer` are not compared where one inside is there.

    Raises:
        LoadError: values differ, shapes differ, or a name is gone; all of them at once, and nothing is changed.
    """
    problems: list[Diagnostic] = []
    found: list[tuple[Tie, Place, list[Place]]] = []
    for group in groups:
        try:
            members = [_current(model, name) for name in group.names]
            source = _holder(group, members, prefer, check_values)
            for member in members:
                # What is replaced may have the dtype and device from before the load.
                _tieable(member, source, ("shapes", "kinds"))
        except LoadError as error:
            problems += error.diagnostics
        else:
            found.append((group, source, members))
    if problems:
        raise LoadError(problems)
    return tuple(_rebuild(model, *entry) for entry in found)


def _current(model: nn.Module, name: str) -> Place:
    """The place of a recorded name; a parametrization with one original keeps it under another name."""
    try:
        return place_of(model, name)
    except LoadError:
        path, _, leaf = name.rpartition(".")
        try:
            return place_of(model, f"{path}.parametrizations.{leaf}.original".lstrip("."))
        except LoadError:
            pass
        raise


def _holder(group: Tie, members: Sequence[Place], prefer: Collection[str], check_values: bool) -> Place:
    real = [p for p in members if not p.tensor.is_meta] or list(members)
    wanted = [p for p, name in zip(members, group.names) if name in prefer and p in real] or real
    first = wanted[0]
    for other in wanted[1:] if check_values else ():
        if other.tensor is not first.tensor and not equal_bytes(first.tensor, other.tensor):
            raise LoadError(
                Diagnostic(
                    "tied-values-differ",
                    f"{first.name!r} and {other.name!r} are tied, and hold different values",
                    remedies=(Remedy("untie", f"cs.untie(model, {literal(other.name)})", kind="before"),),
                    advice="or say which one is meant",
                )
            )
    return first


def equal_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; they are compared where the first of them lies."""
    import torch

    a, b = plain(a, "the first tensor"), plain(b, "the second tensor")
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    x, y = (t.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(x, y.to(x.device))


def _rebuild(model: nn.Module, group: Tie, source: Place, members: Sequence[Place]) -> Tie:
    if group.kind != "storage":
        for member in members:
            if member.tensor is not source.tensor:
                member.put(source.tensor)
        return _proved(model, [m.name for m in members])
    identity = _identity(source.tensor)
    for member in members:
        if member.tensor is not source.tensor and _identity(member.tensor) != identity:
            shared = source.tensor.detach()
            member.put(shared if member.is_buffer else parameter_like(member.tensor, shared))
    return Tie(tuple(m.name for m in members), "storage")
