"""A recipe: rules, and what else must be said; its algebra and its inverse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from ..errors import Diagnostic, RecipeError, Remedy
from ..wording import brief, counted
from .carrying import Carry, as_carry, check_carry_lost
from .dims import DimValue, is_dim
from .keys import KeyPattern
from .law import normalise, signature
from .rules import OpAlgebra, Rule, parse_made, parse_pattern

__all__ = ["Recipe", "Scope"]

Names = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Scope:
    """A pair of prefixes before the rules of a recipe, written here or used by name.

    Args:
        recipe: what stands inside.
        source, target: prefixes, literal or with captures, each ending in its separator.
        use: the name of another recipe that stands inside too.
        inverse: whether the used recipe runs backwards.
        config: the path in the config that `config.` means inside.
    """

    recipe: Recipe
    source: str = ""
    target: str = ""
    use: str | None = None
    inverse: bool = False
    config: str | None = None

    def __post_init__(self) -> None:
        for prefix in (self.source, self.target):
            if prefix:
                KeyPattern.parse(prefix)
            if prefix and prefix[-1] not in "./":
                ended = Remedy("scope", {prefix: f"{prefix}."}, kind="instead")
                text = f"the prefix {prefix!r} does not end in its separator"
                raise RecipeError(Diagnostic("bad-scope", text, remedies=(ended,)))


@dataclass(frozen=True, init=False, repr=False)
class Recipe:
    """Rules over keys and axes, and what else must be said.

    >>> recipe = Recipe(rules=["h.{i}.fc.weight [x y] -> layers.{i}.fc.weight [y x]"], drop=["h.{i}.mask"])
    >>> print(recipe.inverse())
    schema = 1
    rules = [
      "layers.{i}.fc.weight [y x] -> h.{i}.fc.weight [x y]",
    ]

    Args:
        rules: lines of the mapping language, or `Rule` objects.
        drop: source key patterns that go nowhere on purpose.
        init: target key pattern -> initialiser. Axes behind the pattern, and a dtype behind them, give the tensor its
            shape where there is no target: `"router.{i}.weight [e d] BF16" = "normal(std=0.02)"`.
        tie: target key -> the target key it shares its tensor with. With `?` in front it yields: to a rule that makes
            the key, and to a target without it; a key that `rest` brings must be equal.
        same: source key -> the source key it must equal, bit for bit, before it is left out; the mirror of `tie`. With
            `?` in front a rule may take the key as well: the rule has it where the headers do not tie the two names,
            or where the target wants what the rule makes.
        dims: sizes and arguments of ops: numbers, lists by stage, tables by choice or index (also of lists),
            expressions over the config and, for ops, over the indices that the rule's keys capture.
        data: arguments of ops in files beside the recipe, by name: `.npy`, `.json`, `.txt`, `file.safetensors#key`; in
            Python also the numbers themselves.
        names: capture -> {source spelling: target spelling}. Where several terms stand on one side of a rule, a term
            has the spelling of its own side; or the other one, where the keys that it matches all have that. The keys
            of one term have one spelling: `base.{m}.w, lo.{m}.a, lo.{m}.b -> {m}.w | …` joins two files that differ.
        rest: what nothing names: "error", "keep", "drop" or one fallback rule; None inside a scope: as outside.
        scopes: prefixed parts.
        stages: recipes that go on from this one's result, in order.
        carry: paths of trees beside the model, such as an optimizer's state, that follow the rules; see `Plan.carried`.
        carry_lost: "drop" resets state that cannot follow; "error" lists it.
        summary: one line for people.

    Raises:
        RecipeError: all texts that do not parse, at once.
    """

    rules: tuple[Rule, ...]
    drop: tuple[str, ...]
    init: Mapping[str, Any]
    tie: Mapping[str, str]
    same: Mapping[str, str]
    dims: Mapping[str, DimValue]
    data: Mapping[str, Any]
    names: Names
    rest: str | None
    scopes: tuple[Scope, ...]
    stages: tuple[Recipe, ...]
    carry: Mapping[str, Sequence[str]]
    carry_lost: str
    summary: str
    place: str | None = field(default=None, compare=False)

    def __init__(
        self,
        rules: Sequence[str | Rule] = (),
        drop: Sequence[str] = (),
        init: Mapping[str, Any] | None = None,
        tie: Mapping[str, str] | None = None,
        dims: Mapping[str, DimValue] | None = None,
        names: Names | None = None,
        rest: str | None = "error",
        *,
        same: Mapping[str, str] | None = None,
        data: Mapping[str, Any] | None = None,
        scopes: Sequence[Scope] = (),
        stages: Sequence[Recipe] = (),
        carry: Carry = (),
        carry_lost: str = "error",
        summary: str = "",
        place: str | None = None,
    ) -> None:
        problems: list[Diagnostic] = []
        parsed = tuple(_parsed(r, place, problems) for r in ([rules] if isinstance(rules, str | Rule) else rules))
        for text in [drop] if isinstance(drop, str) else drop:
            _try(text, place, problems)
        for text in init or {}:
            _try(text, place, problems, parse_made)
        for text in (*(tie or {}), *(tie or {}).values(), *(same or {}), *(same or {}).values()):
            _try(text, place, problems)
        problems += [] if problems else [*_unbound(tie or {}, place, "tie"), *_unbound(same or {}, place, "same")]
        if rest not in ("error", "keep", "drop", None):
            fallback = _parsed(rest, place, problems) if "->" in rest else None
            marked = fallback is not None and any(t.shared for t in (*fallback.sources, *fallback.targets))
            if "->" not in rest or marked or (fallback is not None and fallback.joined):
                problems.append(_bad_rest(rest, place))
        problems += [_bad_dim(name, value, place) for name, value in (dims or {}).items() if not is_dim(value)]
        if rest is not None:
            problems += _law_breaks((r for r in parsed if r is not None), names or {}, dims or {})
        if problems:
            raise RecipeError(problems)
        put = object.__setattr__
        put(self, "rules", tuple(r for r in parsed if r is not None))
        put(self, "drop", (drop,) if isinstance(drop, str) else tuple(drop))
        put(self, "init", dict(init or {}))
        put(self, "tie", dict(tie or {}))
        put(self, "same", dict(same or {}))
        put(self, "dims", {k: _frozen(v) for k, v in (dims or {}).items()})
        put(self, "data", dict(data or {}))
        put(self, "names", {k: dict(v) for k, v in (names or {}).items()})
        put(self, "rest", rest)
        put(self, "scopes", tuple(scopes))
        put(self, "stages", tuple(stages))
        put(self, "carry", as_carry(carry) or {})
        put(self, "carry_lost", check_carry_lost(carry_lost))
        put(self, "summary", summary)
        put(self, "place", place)

    @property
    def fallback(self) -> Rule | None:
        """The fallback rule, where `rest` is one."""
        if self.rest in ("error", "keep", "drop", None):
            return None
        return Rule.parse(str(self.rest), self.place)

    def __add__(self, other: Recipe) -> Recipe:
        """Both recipes at once; a name that means two things keeps to its own part."""
        if self.stages or other.stages:
            raise RecipeError(
                Diagnostic(
                    "bad-union",
                    "a recipe with stages cannot be united with another",
                    help="unite the stages one by one, then chain them",
                )
            )
        rests = {self.rest, other.rest} - {"error", None}
        if len(rests) > 1:
            raise RecipeError(Diagnostic("bad-union", f"two different rests: {self.rest!r} and {other.rest!r}"))
        rest = rests.pop() if rests else "error"
        summary = " + ".join(s for s in (self.summary, other.summary) if s)
        for table in ("init", "tie", "same"):
            for key in _disagreements(getattr(self, table), getattr(other, table)):
                raise RecipeError(
                    Diagnostic(
                        "bad-union",
                        f"[{table}] says two things of {key!r}: "
                        f"{getattr(self, table)[key]!r} and {getattr(other, table)[key]!r}",
                    )
                )
        apart = any(self.data[n] is not other.data[n] for n in self.data if n in other.data)
        if apart or _disagreements(self.dims, other.dims) or _disagreements(self.names, other.names):
            parts = (Scope(self.but(rest=None, summary="")), Scope(other.but(rest=None, summary="")))
            return Recipe(scopes=parts, rest=rest, summary=summary)
        return Recipe(
            rules=(*self.rules, *other.rules),
            drop=tuple(dict.fromkeys((*self.drop, *other.drop))),
            init={**self.init, **other.init},
            tie={**self.tie, **other.tie},
            same={**self.same, **other.same},
            dims={**self.dims, **other.dims},
            data={**self.data, **other.data},
            names={**self.names, **other.names},
            rest=rest,
            scopes=(*self.scopes, *other.scopes),
            carry={**self.carry, **other.carry},
            carry_lost="drop" if "drop" in (self.carry_lost, other.carry_lost) else "error",
            summary=summary,
        )

    def scoped(self, source: str = "", target: str = "", config: str | None = None) -> Recipe:
        """The recipe with prefixes before its keys.

        >>> print(Recipe(["a -> b"]).scoped(source="m.", target="x."))
        schema = 1
        <BLANKLINE>
        [[scope]]
        source = "m."
        target = "x."
        rules = [
          "a -> b",
        ]
        """
        if self.stages:
            last = len(self.stages) - 1
            stages = [s.scoped(target=target, config=config) if i == last else s for i, s in enumerate(self.stages)]
            return replace_stages(self.but(stages=()).scoped(source=source, config=config), stages)
        inner = self.but(rest=None if self.rest == "error" else self.rest, summary="")
        return Recipe(scopes=(Scope(inner, source, target, config=config),), summary=self.summary)

    def then(self, other: Recipe) -> Recipe:
        """Go on from this recipe's result with another; planned and run as one pass."""
        return replace_stages(self, (*self.stages, other.but(stages=()), *other.stages))

    def inverse(self, ops: OpAlgebra | None = None) -> Recipe:
        """The way back: sides swapped, ops inverted, ties and copies proved the same, initialised keys dropped.

        What was dropped cannot come back; `plan.inverse` refuses there, this does not.

        Raises:
            RecipeError: every op that nothing undoes.
        """
        from .inverting import inverse

        return inverse(self, ops)

    def but(self, **changes: Any) -> Recipe:
        """The recipe with some of its fields changed."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        return Recipe(**{**fields, **changes})

    def dumps(self) -> str:
        """The recipe as TOML text; reading it gives an equal recipe."""
        from .toml import dumps

        return dumps(self)

    def __str__(self) -> str:
        return self.dumps().rstrip("\n")

    def __repr__(self) -> str:
        counted_parts = ((self.drop, "drop"), (self.init, "init"), (self.tie, "tie"), (self.dims, "dim"))
        counts = [counted(len(part), what) for part, what in (*counted_parts, (self.scopes, "scope")) if part]
        rules = (repr(str(rule)) for rule in self.rules[:3])
        return brief("Recipe", counted(len(self.rules), "rule"), *counts, f"rest {self.rest}", *rules)

    def __hash__(self) -> int:
        return hash(self.dumps())


_FIELDS = (
    "rules",
    "drop",
    "init",
    "tie",
    "dims",
    "names",
    "rest",
    "same",
    "data",
    "scopes",
    "stages",
    "carry",
    "carry_lost",
    "summary",
    "place",
)


def replace_stages(recipe: Recipe, stages: Sequence[Recipe]) -> Recipe:
    """The recipe with other stages behind it."""
    return recipe.but(stages=tuple(stages))


def _parsed(rule: str | Rule, place: str | None, problems: list[Diagnostic]) -> Rule | None:
    if isinstance(rule, Rule):
        return rule
    try:
        return Rule.parse(rule, place)
    except RecipeError as error:
        problems.extend(error.diagnostics)
        return None


def _try(
    text: str,
    place: str | None,
    problems: list[Diagnostic],
    parse: Callable[[str, str | None], object] = parse_pattern,
) -> None:
    try:
        parse(text, place)
    except RecipeError as error:
        problems.extend(error.diagnostics)


def _unbound(pairs: Mapping[str, str], place: str | None, table: str) -> list[Diagnostic]:
    """Captures of a [tie] or [same] that the key which is looked for does not bind."""
    found = []
    for alias, base in pairs.items():
        looked_for, spelled = (base, alias) if table == "tie" else (alias, base)
        names = [parse_pattern(text, place)[1].names for text in (looked_for, spelled)]
        for name in names[1]:
            if name not in names[0]:
                found.append(
                    Diagnostic(
                        "unbound-capture",
                        f"[{table}] '{alias}' = '{base}': nothing binds {{{name}}}",
                        place=place,
                        help=f"the captures of {spelled!r} stand in {looked_for!r} too",
                    )
                )
    return found


def _bad_rest(rest: str | None, place: str | None) -> Diagnostic:
    near = get_close_matches(str(rest), ("error", "keep", "drop"), 1)
    meant = (Remedy("rest", {str(rest): near}, kind="instead"),) if near else ()
    advice = '"error", "keep", "drop", or "{k...} -> x.{k...}"'
    return Diagnostic("bad-rest", f"rest = {rest!r}", place=place, remedies=meant, advice=advice)


def _bad_dim(name: str, value: Any, place: str | None) -> Diagnostic:
    return Diagnostic(
        "bad-dim",
        f"dims.{name} = {value!r} is no size",
        place=place,
        help="a number, a list, a table by choice or index, or an expression such as config.num_attention_heads",
    )


def _law_breaks(rules: Iterable[Rule], names: Names, dims: Mapping[str, DimValue]) -> list[Diagnostic]:
    """What breaks the law of a rule whatever the checkpoint; a fragment (`rest=None`) is judged within its scope."""
    found: list[Diagnostic] = []
    numbers = dict.fromkeys(dims, 1)
    for rule in rules:
        try:
            spelled = normalise(rule, {n: pairs for n, pairs in names.items() if n in rule.names})
            sides = (
                [replace(t, pattern=t.pattern.bind(numbers)) for t in side]
                for side in (spelled.sources, spelled.targets)
            )
            sources, targets = map(tuple, sides)
            signature(replace(spelled, sources=sources, targets=targets))
        except RecipeError as error:
            # a name that dims may still settle is no contradiction yet
            found += [d for d in error.diagnostics if d.code != "unknown-dim"]
    return found


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(part) for key, part in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _disagreements(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [name for name in a if name in b and a[name] != b[name]]
