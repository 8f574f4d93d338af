"""The rules for low-rank pairs that belong to rules for weights.

An update of a weight [out, in] is B·A, with A [r, in] and B [out, r], however the weight is stored. So A follows the
input axes of a rule, and B its output axes:

renamed, or regrouped within one side       the same for A or for B
one tensor split along its outputs          each part has all of A, and its rows of B
several tensors joined along their outputs  A stacks, and B becomes block-diagonal: the rank is the sum of theirs
experts stacked on an axis of their own     A [(e r), in], B [out, (r e)], as PEFT stores a parameter's update
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import Diagnostic, RecipeError
from .axes import Axis, Dim
from .captures import Capture, Literal, escape
from .keys import KeyPattern
from .rules import Rule, Term

__all__ = ["PairRules", "pair_rules"]

_WEIGHT = ".weight"
_HARMLESS = "cast"  # a pair keeps its own dtype
_PARTS = {"A": "lora_A", "B": "lora_B"}


@dataclass(frozen=True)
class PairRules:
    """The rules for pairs that one rule for weights becomes.

    Args:
        rules: from the source's names. later: from names that `rules` made, run after them.
        growth: pattern of a target -> how many ranks add up in it.
    """

    rules: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    growth: Mapping[str, int] = field(default_factory=dict)


def pair_rules(rule: Rule, names: Mapping[str, Mapping[str, str]], turned: str | None) -> PairRules:
    """Return the rules for the pairs of the weights of a rule; none where these have no pairs, such as vectors.

    >>> fused = Rule.parse("{p:q,k,v}.weight [(h:p d) ...] -> qkv.weight [(p h:p d) ...]")
    >>> for line in pair_rules(fused, {}, None).rules:
    ...     print(line)
    ? {p:q,k,v}.lora_A.weight [r:p ...] -> qkv.lora_A.weight [(p r:p) ...]
    ? q.lora_B.weight, k.lora_B.weight, v.lora_B.weight -> qkv.lora_B.weight | block_diagonal

    Args:
        names: capture -> {source spelling: target spelling}, of the recipe.
        turned: "source" or "target": the side that stores weights as [in, out] where a rule transposes them.

    Raises:
        RecipeError: weights that the rule makes have no exact pairs.
    """
    calls = [call for call in (*rule.before, *rule.after) if call.name != _HARMLESS]
    has_axes = any(term.axes is not None for term in (*rule.sources, *rule.targets))
    if calls and not has_axes and len(rule.sources) == 1:
        return PairRules()  # a scaled or shifted vector, such as a norm
    if calls or len(rule.sources) > 1:
        raise _refused(rule, "it computes values" if calls else "it joins several tensors")
    if any(_key(term.pattern, "A") is None for term in (*rule.sources, *rule.targets)):
        return PairRules()
    if not has_axes:
        return PairRules(tuple(_renamed(rule.sources[0], target) for target in rule.targets))
    if len(rule.targets) > 1:
        raise _refused(rule, "it rearranges one tensor into several places")
    lists = [term.axes for term in (*rule.sources, *rule.targets)]
    if all(axes is None or (len(axes.dims) < 2 and not axes.has_ellipsis) for axes in lists):
        return PairRules()
    try:
        return _Rearranged(rule, names, turned).rules()
    except RecipeError:
        if any(_is_weight(term.pattern) for term in (*rule.sources, *rule.targets)):
            raise
        return PairRules()  # a parameter that is not a matrix, such as positions


@dataclass(frozen=True)
class _MatrixSide:
    """A term as a matrix: its output and input axes, and the stacked index before them.

    Args:
        first, second: the dims of the matrix, in the order in which they are stored.
        stack: the axis of the experts, where these are stacked.
    """

    pattern: KeyPattern
    first: Dim
    second: Dim
    stack: Axis | None = None


@dataclass
class _Rearranged:
    """A rule with one source, one target and axes."""

    rule: Rule
    names: Mapping[str, Mapping[str, str]]
    turned: str | None

    def rules(self) -> PairRules:
        """The rules for A and for B."""
        source, target = (self.side(term) for term in (self.rule.sources[0], self.rule.targets[0]))
        keys = [set(side.pattern.names) for side in (source, target)]
        gathered, scattered = keys[0] - keys[1], keys[1] - keys[0]
        crossed = self.crosses(source, target)
        if crossed:
            source, target = self.straight(source, target, bool(gathered or scattered))
        stack = source.stack or target.stack
        parts = (gathered | scattered) - ({stack.name} if stack else set())
        if (gathered and scattered) or len(parts) > 1 or (stack and stack.name not in gathered | scattered):
            raise _refused(self.rule, "its keys and axes meet in another way than weights are split, joined or stacked")
        part = next(iter(parts), None)
        if gathered:
            return self.joined(source, target, part)
        return self.split(source, target, part)

    def side(self, term: Term) -> _MatrixSide:
        """A term as a matrix, behind the index of the experts where these are stacked."""
        dims, bound = list(term.axes.dims if term.axes else ()), set(self.rule.sources[0].pattern.names)
        bound |= set(self.rule.targets[0].pattern.names)
        stack = None
        if len(dims) > 1 and len(dims[0].axes) == 1 and not dims[0].grouped and dims[0].axes[0].name in bound:
            stack = dims.pop(0).axes[0]
        if len(dims) == 1 and dims[0].ellipsis:  # all of a matrix, as it is
            dims = [Dim((Axis(self.fresh("o")),)), Dim((Axis(self.fresh("d")),))]
        if len(dims) != 2 or dims[0].ellipsis:
            raise _refused(self.rule, "its axes are not those of matrices")
        return _MatrixSide(term.pattern, _plain(dims[0]), _plain(dims[1]), stack)

    def crosses(self, source: _MatrixSide, target: _MatrixSide) -> bool:
        """Whether the rule transposes; dims whose names mix have no pair."""
        first, second, left, right = (_names(dim) for dim in (source.first, source.second, target.first, target.second))
        bound = set(source.pattern.names) | set(target.pattern.names)
        inner = [names - bound for names in (first, second, left, right)]
        if inner[0] == inner[2] and inner[1] == inner[3]:
            return False
        if inner[0] == inner[3] and inner[1] == inner[2]:
            return True
        raise _refused(self.rule, "it mixes inputs with outputs")

    def straight(self, source: _MatrixSide, target: _MatrixSide, matters: bool) -> tuple[_MatrixSide, _MatrixSide]:
        """Both sides as [out, in]; where each dim is only moved it does not matter which of them is."""
        if self.turned is None and (matters or str(source.first) != str(target.second)):
            raise _refused(
                self.rule, "it transposes; turned names the side that stores weights as [in, out]", 'turned="source"'
            )
        if self.turned == "source":
            return replace(source, first=source.second, second=source.first), target
        return source, replace(target, first=target.second, second=target.first)

    def joined(self, source: _MatrixSide, target: _MatrixSide, part: str | None) -> PairRules:
        """Several tensors become one."""
        if part is None:
            return PairRules(self.stacked(source, target, source.pattern))
        choices = self.choices(source.pattern, part)
        if not choices:
            raise _refused(self.rule, f"{{{part}}} lists no choices, so its ranks cannot be added up")
        rank, growth = self.fresh("r"), {str(target.pattern): len(choices)}
        tail = _tail(source, rank)
        along = part in _names(target.first)
        diagonal, stacking = ("B", "A") if along else ("A", "B")
        mixed, inner = (target.first, source.first) if along else (target.second, source.second)
        front = Dim((Axis(part), *inner.axes), grouped=True)
        key = target.pattern
        if target.stack:
            key = KeyPattern.parse(f"{target.pattern}.{{{target.stack.name}}}")
        whole, kept = f"({part} {rank}:{part})", source.second if along else source.first
        lists = [f"[{one} {kept}]" if along else f"[{kept} {one}]" for one in (f"{rank}:{part}", whole)]
        terms = ", ".join(str(_key(_chosen(source.pattern, part, choice), diagonal)) for choice in choices)
        rules = (
            f"? {_key(source.pattern, stacking)} {lists[0]} -> {_key(key, stacking)} {lists[1]}",
            f"? {terms} -> {_key(key, diagonal)} | block_diagonal",
        )
        regrouped = [str(axis) for axis in mixed.axes] != [str(axis) for axis in front.axes]
        placed = Dim(
            tuple(replace(axis, choices=choices) if axis.name == part else axis for axis in front.axes), grouped=True
        )
        joined = replace(source, first=placed if along else source.first, second=source.second if along else placed)
        if target.stack:
            return PairRules(rules, self.stacked(joined, target, key), growth)
        if not regrouped:
            return PairRules(rules, (), growth)
        sides = [f"[{side} {tail}]" if along else f"[{rank} {side}]" for side in (placed, mixed)]
        later = f"? {_key(key, diagonal)} {sides[0]} -> {_key(key, diagonal)} {sides[1]}"
        return PairRules(rules, (later,), growth)

    def stacked(self, source: _MatrixSide, target: _MatrixSide, pattern: KeyPattern) -> tuple[str, ...]:
        """Pairs of single experts become those of a parameter that holds all of them."""
        rank, expert = self.fresh("r"), target.stack.name if target.stack else ""
        return (
            f"? {_key(pattern, 'A')} [{rank} {source.second}] -> "
            f"{_key(target.pattern, 'A')} [({expert} {rank}) {target.second}]",
            f"? {_key(pattern, 'B')} [{source.first} {rank}] -> "
            f"{_key(target.pattern, 'B')} [{target.first} ({rank} {expert})]",
        )

    def split(self, source: _MatrixSide, target: _MatrixSide, part: str | None) -> PairRules:
        """One tensor becomes several, or stays one."""
        rank = self.fresh("r")
        along = part is not None and part in _names(source.first)
        tail = rank if source.stack else _tail(source, rank)
        before = {"A": f"[{rank} {source.second}]", "B": f"[{source.first} {tail}]"}
        after = {"A": f"[{rank} {target.second}]", "B": f"[{target.first} {tail}]"}
        if source.stack:
            expert = source.stack.name
            before = {"A": f"[({expert} {rank}) {source.second}]", "B": f"[{source.first} ({rank} {expert})]"}
        whole = "" if part is None else "A" if along else "B"
        made = []
        for letter in "AB":
            key = _key(source.pattern, letter)
            texts = before[letter], after[letter]
            if texts[0] == texts[1] or (letter == whole and not source.stack):
                texts = "", ""
            patterns = [target.pattern]
            if letter == whole and part is not None:
                choices = self.choices(target.pattern, part) or self.choices(source.pattern, part)
                if not choices:
                    raise _refused(self.rule, f"{{{part}}} lists no choices, so that A cannot be copied to each")
                patterns = [_chosen(target.pattern, part, choice) for choice in choices]
            terms = ", ".join(f"{_key(pattern, letter)} {texts[1]}".rstrip() for pattern in patterns)
            made.append(f"? {key} {texts[0]}".rstrip() + f" -> {terms}")
        return PairRules(tuple(made))

    def choices(self, pattern: KeyPattern, name: str) -> tuple[str, ...]:
        """The texts that a capture may have in a pattern."""
        for capture in pattern.captures:
            if capture.name == name and capture.choices:
                return capture.choices
        table = self.names.get(name, {})
        return tuple(table.values() if pattern is self.rule.targets[0].pattern else table)

    def fresh(self, name: str) -> str:
        """A name that the rule does not use."""
        while name in self.rule.names:
            name += "_"
        return name


def _plain(dim: Dim) -> Dim:
    """A dim of weights, of a rule that biases may share."""
    return replace(dim, optional=False)


def _tail(source: _MatrixSide, rank: str) -> str:
    """The dims of B behind the outputs: of a convolution there are more than the rank."""
    return "..." if source.second.ellipsis else rank


def _names(dim: Dim) -> set[str]:
    return {"..."} if dim.ellipsis else {axis.name for axis in dim.axes}


def _renamed(source: Term, target: Term) -> str:
    """The rule of weights that only get another name: one for A, B and magnitudes."""
    if isinstance(source.pattern.pieces[-1], Capture) and source.pattern.pieces[-1].rest:
        return f"? {source} -> {target}"
    capture = "pair"
    while capture in (*source.pattern.names, *target.pattern.names):
        capture += "_"
    part = f"{{{capture}:lora_A,lora_B,lora_magnitude_vector}}"
    return f"? {_key(source.pattern, part)} -> {_key(target.pattern, part)}"


def _key(pattern: KeyPattern, part: str) -> str | None:
    """The pattern of a part of the pairs; None where the keys are not those of weights."""
    part, text, last = _PARTS.get(part, part), str(pattern), pattern.pieces[-1]
    if isinstance(last, Capture):
        if last.rest:
            return text
        shown = f"{{{last}}}"
        return f"{text[: -len(shown)]}{part}.{shown}" if text[: -len(shown)].endswith((".", "/")) else None
    if last.text == "weight":
        return f"{text[: -len('weight')]}{part}.weight"
    if last.text.endswith(_WEIGHT):
        return f"{text[: -len(_WEIGHT)]}.{part}.weight"
    return None if last.text.endswith("bias") else f"{text}.{part}.weight"


def _is_weight(pattern: KeyPattern) -> bool:
    """Whether keys end as those of a layer's weight do."""
    last = pattern.pieces[-1]
    return isinstance(last, Capture) or last.text == "weight" or last.text.endswith(_WEIGHT)


def _chosen(pattern: KeyPattern, name: str, choice: str) -> KeyPattern:
    """The pattern with a choice in place of its capture."""
    pieces = [Literal(choice) if isinstance(p, Capture) and p.name == name else p for p in pattern.pieces]
    return KeyPattern.parse(
        "".join(f"{{{p}}}" if isinstance(p, Capture) else escape(p.text, first=False) for p in pieces)
    )


def _refused(rule: Rule, why: str, help: str | None = None) -> RecipeError:
    text = f"a rule has no exact rule for low-rank pairs: {why}"
    advice = help or "merge the adapter into the base first, and convert the merged model"
    return RecipeError(Diagnostic("no-adapter-rule", text, place=rule.place, notes=(str(rule),), help=advice))
