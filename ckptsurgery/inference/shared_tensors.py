"""One source tensor for several targets: an embedding and the output head, or one table for every layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ..specs import TensorSpec
from .moves import TensorMove
from .placement import Placement
from .vocabulary import EXCLUSIVE, concepts

__all__ = ["shared"]

_NUMBER = re.compile(r"[0-9]+")
_INPUTS = next(group for group in EXCLUSIVE if "text" in group)
_GENERAL = frozenset({"block", "linear", "out"})


def shared(
    source: Mapping[str, TensorSpec],
    target: Mapping[str, TensorSpec],
    moves: Sequence[TensorMove],
    placement: Placement,
) -> tuple[list[TensorMove], dict[str, str]]:
    """The moves of tensors that several open targets need, and the other targets with the one that each is tied to."""
    made = {k for m in moves for k in m.targets}
    used = {k for m in moves for k in m.sources}
    first: dict[str, str] = {}
    for move in moves:
        if len(move.sources) == len(move.targets) == 1 and not move.left:
            first.setdefault(move.sources[0], move.targets[0])
    shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for key, spec in source.items():
        shapes[tuple(spec.shape)].append(key)
    added: list[TensorMove] = []
    common: dict[str, str] = {}
    ties: dict[str, str] = {}
    open_ = [k for k, spec in target.items() if k not in made and spec.shape]
    for key in sorted(
        open_, key=lambda k: bool({"head", "output"} & _meant(k))
    ):  # an embedding before what is tied to it
        shape = tuple(target[key].shape)
        alike = [k for k in shapes[shape] if _placed_alike(k, key, placement) and not _of_other_input(k, key)]
        turned = shapes[shape[::-1]] if len(shape) == 2 and shape[0] != shape[1] else []
        free = [k for k in (*alike, *turned) if k not in used]
        if free:
            region = placement.region(1, key, least=0.0)
            wanting = [
                k for k in open_
                if tuple(target[k].shape) in (shape, shape[::-1]) and placement.region(1, k, least=0.0) == region
            ]  # fmt: skip
            if len(free) != 1 or free[0] in turned or len(wanting) < 2 or not _one_for_all(free[0], wanting, placement):
                continue  # it may be one of these
            added.append(TensorMove((free[0],), (key,)))
            used.add(free[0])
            first[free[0]] = common[key] = key
            continue
        one = _owner(alike, key, shape)
        if one is None or one not in first or first[one] == key or _of_other_input(first[one], key):
            continue
        if (first[one] in common and _alike(first[one], key)) or (
            (_sharing(one, key) and not _in_layers(key, placement))
            or _same_part(one, key, placement)
            or _near(first[one], key)
        ):
            ties[key] = first[one]
    return added, ties


def _owner(alike: Sequence[str], key: str, shape: Sequence[int]) -> str | None:
    """The only source of a shape that a target can share; of matrices, the only embedding."""
    if len(alike) > 1 and len(shape) == 2:
        tables = [k for k in alike if {"embedding", "token"} & _meant(k)]
        alike = tables if len(tables) == 1 else [k for k in tables if "token" in _meant(k)]
    return alike[0] if len(alike) == 1 else None


def _placed_alike(source: str, key: str, placement: Placement) -> bool:
    """Whether a tensor is in the stack that a target's stack corresponds to, where the target is in one."""
    region, there = placement.region(1, key, least=0.0), placement.region(0, source, least=0.0)
    if not region:
        return not there or not _in_layers(key, placement)
    return there in (0, region)


def _of_other_input(one: str, two: str) -> bool:
    """Whether two tensors are called after different kinds of input, such as text and images."""
    first, second = _meant(one) & _INPUTS, _meant(two) & _INPUTS
    return bool(first and second and not first & second)


def _in_layers(key: str, placement: Placement) -> bool:
    return any(stack.holds(key) is not None for stack in placement.target)


def _one_for_all(source: str, wanting: Iterable[str], placement: Placement) -> bool:
    """Whether one tensor is what all of the targets that want its shape are made of."""
    listed = list(wanting)
    one, two = _meant(source) - _GENERAL, _meant(listed[0]) - _GENERAL
    if all(_alike(listed[0], k) for k in listed) and len(one & two) * 2 > min(len(one), len(two)):
        return True  # a part that every layer has, and that all of them share
    if any(_in_layers(k, placement) for k in listed):
        return all(_same_part(source, k, placement) for k in listed)  # an embedding does not belong in layers
    return all(_sharing(source, k) for k in listed)


def _alike(one: str, other: str) -> bool:
    """Whether two keys differ only in their numbers."""
    return _NUMBER.sub("#", one) == _NUMBER.sub("#", other)


def _same_part(source: str, key: str, placement: Placement) -> bool:
    """Whether two tensors of corresponding stacks are called alike, but for their layers."""
    region = placement.region(1, key, least=0.0)
    one, two = _meant(source) - _GENERAL, _meant(key) - _GENERAL
    return bool(region) and region == placement.region(0, source, least=0.0) and len(one & two) * 2 > len(one | two)


def _meant(key: str) -> set[str]:
    return {c for segment in key.replace("/", ".").split(".") for c, _ in concepts(segment)}


def _sharing(source: str, key: str) -> bool:
    """Whether two tensors of one shape may well be one: an embedding and an output, or neighbours by name."""
    one, two = _meant(source), _meant(key)
    if (
        {"embedding", "token"} & one
        and {"head", "output", "decoder", "token", "embedding"} & two
        and "position" not in one | two
    ):
        return True
    return _within(source, key) or key.split(".")[:-2] == source.split(".")[:-2]


def _near(made: str, key: str) -> bool:
    return _within(made, key) or _within(key, made)


def _within(one: str, key: str) -> bool:
    """Whether a tensor stands one module deeper than another, under the same one."""
    return key.split(".")[:-2] == one.split(".")[:-1] != []
