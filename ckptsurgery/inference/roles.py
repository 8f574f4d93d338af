"""What a unit does in its module, from names and from the shapes beside it: query, key, value, out; gate, up, down."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from .units import Unit, split_path
from .vocabulary import concepts, words

__all__ = ["SORTS", "attention_sorts", "factor_of", "frame_of", "listed_parts", "parent", "part_of", "with_roles"]

_ATTENTION = ("query", "key", "value", "qkv", "kv")
_FEED = ("gate", "up", "down")
_SEPARATORS = re.compile(r"[./]")
SORTS = frozenset({"self", "cross"})  # of attention
_LETTER = {"g": "gate", "q": "query", "k": "key", "v": "value"}
_RUN = re.compile(r"w?([gqkv]{2,4})")
_FACTOR = re.compile(r"\blora (?:embedding |linear |layer )*(a|b|down|up)$")


def parent(path: str) -> str:
    """The path that a unit's siblings share."""
    return split_path(path)[0]


@lru_cache(maxsize=65536)
def part_of(path: str) -> tuple[str, tuple[str, ...]] | None:
    """Which of query, key and value a unit makes, with the words around it, by which it finds its siblings.

    >>> part_of("h.0.attn.q_proj"), part_of("h.0.attn.to_k"), part_of("h.0.attn.q_norm"), part_of("h.0.wv")
    (('query', ('*', 'proj')), ('key', ('to', '*')), None, ('value', ('*',)))
    """
    parts = words(split_path(path)[1])
    if len(parts) > 4 or "norm" in parts or "ln" in parts or "layernorm" in parts:
        return None
    found = [(i, c) for i, w in enumerate(parts) for c, _ in concepts(w) if c in ("query", "key", "value")]
    if len(found) != 1:
        return None
    place, role = found[0]
    return role, (*parts[:place], "*", *parts[place + 1 :])


@lru_cache(maxsize=65536)
def listed_parts(path: str) -> tuple[str, ...]:
    """Return the parts that a name lists, in its order; fewer than two are none.

    >>> listed_parts("mlp.up_gate_proj"), listed_parts("attn.gqkv"), listed_parts("attn.Wqkv"), listed_parts("attn.q")
    (('up', 'gate'), ('gate', 'query', 'key', 'value'), ('query', 'key', 'value'), ())
    """
    found: list[str] = []
    for word in words(split_path(path)[1]):
        letters = _RUN.fullmatch(word)
        if letters and len(set(letters[1])) == len(letters[1]):
            found += (_LETTER[letter] for letter in letters[1])
        else:
            found += [part for part in _part_names(word) if part not in found]
    return tuple(found) if len(found) > 1 else ()


def frame_of(path: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the part that a unit makes, the gate of an attention too, with the words around it; None for several.

    >>> frame_of("attn.gate_proj"), frame_of("attn.q_proj")
    (('gate', ('*', 'proj')), ('query', ('*', 'proj')))
    """
    parts = words(split_path(path)[1])
    found = [(i, part) for i, word in enumerate(parts) for part in _part_names(word)]
    if len(parts) > 4 or len(found) != 1:
        return None
    place, part = found[0]
    return part, (*parts[:place], "*", *parts[place + 1 :])


def _part_names(word: str) -> list[str]:
    return [c for c, _ in concepts(word) if c in _LETTER.values() or c == "up"]


def attention_sorts(templates: Iterable[str]) -> dict[str, str]:
    """Return key -> "self" or "cross" for the parts of attentions.

    Where one of two sibling attentions is named, the other one is of the other sort.

    >>> attention_sorts(["h.#.self_attn.q", "h.#.attn.q", "h.#.mlp.up"])
    {'h.#.self_attn.q': 'self', 'h.#.attn.q': 'cross'}
    """
    modules: dict[str, dict[str, tuple[set[str], list[str]]]] = {}
    for template in dict.fromkeys(templates):
        segments = _SEPARATORS.split(template)
        for at, segment in enumerate(segments[:-1]):
            meant = {c for c, _ in concepts(segment)}
            if "attention" in meant or meant & SORTS:
                sorts, parts = modules.setdefault("/".join(segments[:at]), {}).setdefault(segment, (set(), []))
                sorts |= meant & SORTS
                parts.append(template)
                break
    found: dict[str, str] = {}
    for beside in modules.values():
        called = set().union(*(sorts for sorts, _ in beside.values()))
        for sorts, parts in beside.values():
            sort = sorts or (SORTS - called if len(beside) == 2 and len(called) == 1 else ())
            if len(sort) == 1:
                found |= dict.fromkeys(parts, next(iter(sort)))
    return found


@lru_cache(maxsize=65536)
def factor_of(path: str) -> frozenset[str]:
    """Return which factor of a low-rank update a unit is: `"narrow"` (A, down), `"widen"` (B, up), or neither.

    >>> [*factor_of("q.lora_A"), *factor_of("q.lora_B.default"), *factor_of("q_lora.down"), *factor_of("lora_x.down")]
    ['narrow', 'widen', 'narrow']
    """
    segments = _SEPARATORS.split(path)[-4:]
    for end in (len(segments), len(segments) - 1):  # the last segment may be the adapter's name
        found = _FACTOR.search(" ".join(word for segment in segments[:end] for word in words(segment)))
        if found:
            return frozenset({"narrow" if found[1] in ("a", "down") else "widen"})
    return frozenset()


def with_roles(units: Iterable[Unit], ordered: bool = True) -> list[Unit]:
    """The units, each with the role that its name and its neighbours give it.

    Args:
        ordered: whether the order of the units is that of definition.
    """
    listed = list(units)
    families: dict[str, list[Unit]] = {}
    for unit in listed:
        families.setdefault(parent(unit.path), []).append(unit)
    roles: dict[str, frozenset[str]] = {}
    for path, members in families.items():
        # A factor of an update is named after the layer beside it, and does not do what that layer does.
        roles.update((u.path, factor) for u in members if (factor := factor_of(u.path)))
        roles.update(_in_attention(path, [u for u in members if u.path not in roles]))
        free = [u for u in members if u.path not in roles and _is_matrix(u)]
        roles.update(_in_feed_forward(free, ordered))
    # What a fused neighbour showed before it was fused is not forgotten.
    return [replace(u, roles=roles.get(u.path, u.roles)) for u in listed]


def _is_matrix(unit: Unit) -> bool:
    weight = unit.leaves.get("weight")
    return weight is not None and len([n for n in weight.shape if n > 1]) >= 2


def _in_attention(path: str, members: Sequence[Unit]) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    context = {c for segment in path.replace("/", ".").split(".") for c, _ in concepts(segment)}
    for unit in members:
        part = part_of(unit.path)
        named = {c for c, _ in concepts(split_path(unit.path)[1])}
        if part is not None and (_is_matrix(unit) or len(unit.weight.shape) == 1):
            found[unit.path] = frozenset({part[0]})
        elif "qkv" in named and _is_matrix(unit):
            found[unit.path] = frozenset({"qkv"})
        elif "kv" in named and _is_matrix(unit):
            found[unit.path] = frozenset({"kv"})
        elif (
            "attention" in named | context
            and "mlp" not in named
            and "out" in named | _last_two(unit.path)
            and _is_matrix(unit)
        ):
            found[unit.path] = frozenset({"out"})
    rest = [u for u in members if u.path not in found and _is_matrix(u)]
    counted = [re.fullmatch(r"(.*?)(\d+)", split_path(u.path)[1]) for u in rest]
    if (
        not found
        and len(rest) > 1
        and "attention" in context
        and len({m and m[1] for m in counted}) == 1
        and counted[0]
    ):
        # Numbered by the order of use, the last one leads out.
        found[max(rest, key=lambda u: u.numbers[-1]).path] = frozenset({"out"})
        return found
    if (
        len(rest) == 1
        and any(r & set(_ATTENTION) for r in found.values())
        and not any("out" in r for r in found.values())
    ):
        found[rest[0].path] = frozenset({"out"})
    return found


def _last_two(path: str) -> set[str]:
    segments = path.replace("/", ".").split(".")[-2:]
    return {c for s in segments for c, _ in concepts(s)}


def _in_feed_forward(members: Sequence[Unit], ordered: bool) -> dict[str, frozenset[str]]:
    """Two [I, H] and one [H, I] beside each other are a gated feed-forward; one and one are a plain one."""
    by_shape: dict[tuple[int, ...], list[Unit]] = {}
    for unit in members:
        by_shape.setdefault(tuple(n for n in unit.leaves["weight"].shape if n > 1), []).append(unit)
    found: dict[str, frozenset[str]] = {}
    for shape, ins in by_shape.items():
        outs = by_shape.get((*shape[:-2], shape[-1], shape[-2]), [])
        if len(shape) not in (2, 3) or shape[-1] == shape[-2] or len(outs) != 1:
            continue
        if len(ins) == 2:
            first, second = _gate_first(ins)
            if first is not None and second is not None:
                found[first.path], found[second.path] = frozenset({"gate"}), frozenset({"up"})
            found[outs[0].path] = frozenset({"down"})
        elif len(ins) == 1 and ins[0].path not in found and _up_first(ins[0], outs[0], ordered):
            found[ins[0].path], found[outs[0].path] = frozenset({"up"}), frozenset({"down"})
    return found


def _up_first(one: Unit, two: Unit, ordered: bool) -> bool:
    """Whether the first of two matrices leads into the feed-forward's width: told by names, or by definition."""
    numbers = [[int(w) for w in words(split_path(u.path)[1]) if w.isdigit()] for u in (one, two)]
    if numbers[0] and numbers[1] and numbers[0] != numbers[1]:
        return numbers[0] < numbers[1]
    said = [_way(split_path(u.path)[1]) for u in (one, two)]
    if said in ([{"down"}, {"up"}], [{"down"}, set()], [set(), {"up"}]):
        return False
    if said in ([{"up"}, {"down"}], [{"up"}, set()], [set(), {"down"}]):
        return True
    return ordered and one.order < two.order


def _way(segment: str) -> set[str]:
    """Whether a name means up or down: the word that means it most, since "proj" may mean either."""
    worth = {c: w for c, w in concepts(segment) if c in ("up", "down")}
    return {c for c, w in worth.items() if w == max(worth.values())}


def _gate_first(pair: Sequence[Unit]) -> tuple[Unit | None, Unit | None]:
    named = [u for u in pair if "gate" in words(split_path(u.path)[1]) or "gate" in split_path(u.path)[1]]
    if len(named) == 1:
        return named[0], next(u for u in pair if u is not named[0])
    tails = [[int(w) for w in words(split_path(u.path)[1]) if w.isdigit()] for u in pair]
    if tails[0] and tails[1] and tails[0] != tails[1]:
        first, second = sorted(zip(tails, pair), key=lambda p: p[0])
        return first[1], second[1]
    return None, None
