"""A recipe: rules and all that goes with them; its algebra, its inverse and its text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Diagnostic, RecipeError, Remedy
from ..toml_writing import key_text, quoted, table_lines, value_text
from ..wording import brief, counted
from .carrying import Carry, as_carry, check_carry_lost
from .config_edits import ConfigEdits, edits_of
from .dims import DimValue, is_dim
from .keys import KeyPattern
from .recipe_checks import (
    bad_dim,
    bad_rest,
    check_text,
    law_breaks,
    parsed_rule,
    unbound_captures,
    wrong_entries,
    wrong_values,
)
from .registered_ops import RegisteredOps
from .rules import OpAlgebra, Rule, parse_made

__all__ = ["SCHEMA", "Recipe", "Scope"]

SCHEMA = 1
"""The schema of a recipe's text that is written, and the newest that is read."""

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

    def inverted(self, ops: OpAlgebra) -> Scope:
        """Return the scope that leads back: prefixes swapped, the recipe inside inverted."""
        turned = not self.inverse if self.use else False
        return replace(self, recipe=self.recipe.inverse(ops), source=self.target, target=self.source, inverse=turned)


@dataclass(frozen=True, init=False, repr=False)
class Recipe:
    """Rules over keys and axes, with ties, initialisers, drops and sizes.

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
        config: edits of the config that goes along, `drop`, `rename` and `set`; see `ConfigEdits`.
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
    config: ConfigEdits
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
        config: Mapping[str, Any] | ConfigEdits | None = None,
        summary: str = "",
        place: str | None = None,
    ) -> None:
        rules = tuple(rules) if isinstance(rules, Iterator) else rules
        drop = tuple(drop) if isinstance(drop, Iterator) else drop
        given: dict[str, Any] = {"rules": rules, "drop": drop, "scopes": scopes, "stages": stages, "rest": rest}
        given |= {"init": init, "tie": tie, "same": same, "dims": dims, "data": data, "names": names}
        problems = _wrong_kinds(given, place)
        if problems:
            raise RecipeError(problems)
        parsed = tuple(parsed_rule(r, place, problems) for r in ([rules] if isinstance(rules, str | Rule) else rules))
        for text in [drop] if isinstance(drop, str) else drop:
            check_text(text, place, problems)
        for text in init or {}:
            check_text(text, place, problems, parse_made)
        for text in (*(tie or {}), *(tie or {}).values(), *(same or {}), *(same or {}).values()):
            check_text(text, place, problems)
        if not problems:
            problems += unbound_captures(tie or {}, place, "tie")
            problems += unbound_captures(same or {}, place, "same")
        if rest not in ("error", "keep", "drop", None):
            fallback = parsed_rule(rest, place, problems) if "->" in rest else None
            marked = fallback is not None and any(t.shared for t in (*fallback.sources, *fallback.targets))
            if "->" not in rest or marked or (fallback is not None and fallback.joined):
                problems.append(bad_rest(rest, place))
        problems += [bad_dim(name, value, place) for name, value in (dims or {}).items() if not is_dim(value)]
        if rest is not None:
            problems += law_breaks((r for r in parsed if r is not None), names or {}, dims or {})
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
        put(self, "carry", {} if carry == () else as_carry(carry) or {})
        put(self, "carry_lost", carry_lost if carry_lost == "error" else check_carry_lost(carry_lost))
        put(self, "config", edits_of(config, place) if config is not None else ConfigEdits())
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
            parts = (Scope(self.replace(rest=None, summary="")), Scope(other.replace(rest=None, summary="")))
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
            config=self.config + other.config,
            summary=summary,
        )

    def scoped(self, source: str = "", target: str = "", config: str | None = None) -> Recipe:
        """Return the recipe with prefixes before its keys.

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
            return self.replace(stages=()).scoped(source=source, config=config).replace(stages=tuple(stages))
        inner = self.replace(rest=None if self.rest == "error" else self.rest, summary="")
        return Recipe(scopes=(Scope(inner, source, target, config=config),), summary=self.summary)

    def then(self, other: Recipe) -> Recipe:
        """Chain another recipe behind this one; both are planned and run as one pass."""
        return self.replace(stages=(*self.stages, other.replace(stages=()), *other.stages))

    def inverse(self, ops: OpAlgebra | None = None) -> Recipe:
        """Return the way back: sides swapped, ops inverted, ties and copies proved equal, initialised keys dropped.

        What was dropped cannot come back; `plan.inverse` refuses there, this does not.

        Raises:
            RecipeError: every op that nothing undoes.
        """
        algebra = ops or RegisteredOps()
        if self.stages:
            first, *others = [stage.inverse(algebra) for stage in reversed((self.replace(stages=()), *self.stages))]
            return first.replace(stages=tuple(others))
        problems: list[Diagnostic] = []
        rules: list[Rule] = []
        for rule in self.rules:
            try:
                rules.append(rule.inverse(algebra))
            except RecipeError as error:
                problems.extend(error.diagnostics)
        if problems:
            raise RecipeError(problems)
        fallback = self.fallback
        return Recipe(
            rules=rules,
            drop=tuple(map(_made_pattern, self.init)),
            tie=self.same,
            same=self.tie,
            dims=self.dims,
            data=self.data,
            names={name: _swapped(name, pairs) for name, pairs in self.names.items()},
            rest=str(fallback.inverse(algebra)) if fallback else "error" if self.rest == "drop" else self.rest,
            scopes=[scope.inverted(algebra) for scope in self.scopes],
            carry=[*self.carry],
            carry_lost=self.carry_lost,
            config=self.config.inverse(),
            summary=f"inverse of: {self.summary}" if self.summary else "",
            place=self.place,
        )

    def adapters(self, turned: str | None = None, prefix: str = "base_model.model.") -> Recipe:
        """Return the recipe for low-rank pairs (LoRA) of the weights that this one converts.

        >>> print(Recipe(["{p:a,b}.weight [o i] -> w.weight [(p o) i]"]).adapters(prefix="").rules[1])
        ? a.lora_B.weight, b.lora_B.weight -> w.lora_B.weight | block_diagonal

        A [r, in] follows a weight's input axes and B [out, r] its output axes. Parts of a weight that is split have all
        of A. Where weights are joined, A stacks and B becomes block-diagonal: the rank is the sum of theirs, as the
        summary notes. Alpha grows by the same factor, since B·A is scaled by alpha / r. Every rule is optional, since
        an adapter changes some modules only.

        Args:
            turned: "source" or "target": the side that stores weights as [in, out] where a rule transposes them.
            prefix: before the keys of both sides.

        Raises:
            RecipeError: every rule whose weights have no exact pairs.
        """
        from .adapter_recipes import adapters_of  # few recipes are asked for theirs

        return adapters_of(self, turned, prefix)

    def replace(self, **changes: Any) -> Recipe:
        """Return the recipe with some of its fields changed.

        >>> Recipe(["a -> b"]).replace(rest="keep").rest
        'keep'
        """
        return replace(self, **changes)

    def dumps(self) -> str:
        """Return the recipe as TOML text; reading it gives an equal recipe."""
        return "\n".join([f"schema = {SCHEMA}", *_lines(self, "", "error")]) + "\n"

    def __str__(self) -> str:
        return self.dumps().rstrip("\n")

    def __repr__(self) -> str:
        counted_parts = ((self.drop, "drop"), (self.init, "init"), (self.tie, "tie"), (self.dims, "dim"))
        counts = [counted(len(part), what) for part, what in (*counted_parts, (self.scopes, "scope")) if part]
        rules = (repr(str(rule)) for rule in self.rules[:3])
        return brief("Recipe", counted(len(self.rules), "rule"), *counts, f"rest {self.rest}", *rules)

    def __hash__(self) -> int:
        return hash(self.dumps())


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(part) for key, part in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _disagreements(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [name for name in a if name in b and a[name] != b[name]]


def _made_pattern(init: str) -> str:
    """The pattern of an entry of `[init]`, without axes and dtype."""
    optional, term, _ = parse_made(init)
    return ("? " if optional else "") + str(term.pattern)


def _swapped(name: str, pairs: Mapping[str, str]) -> dict[str, str]:
    swapped = {target: source for source, target in pairs.items()}
    if len(swapped) < len(pairs):
        raise RecipeError(Diagnostic("not-invertible", f"names.{name} spells two sources alike"))
    return swapped


def _lines(recipe: Recipe, path: str, rest: str | None, within: str | None = None) -> list[str]:
    """The lines of a recipe's text; `path` are the tables around it, `rest` is what needs no line.

    Args:
        within: the part of the config that the edits of a scope are for.
    """
    lines = [f"summary = {quoted(recipe.summary)}"] if recipe.summary else []
    if recipe.rest != rest and recipe.rest is not None:
        lines.append(f"rest = {quoted(recipe.rest)}")
    if recipe.rules:
        lines += ["rules = [", *(f"  {quoted(str(r))}," for r in recipe.rules), "]"]
    if recipe.drop:
        lines += ["drop = [", *(f"  {quoted(d)}," for d in recipe.drop), "]"]
    if recipe.carry and not any(recipe.carry.values()):
        lines.append(f"carry = {value_text([*recipe.carry])}")
    if recipe.carry_lost != "error":
        lines.append(f"carry_lost = {quoted(recipe.carry_lost)}")
    tables: dict[str, Mapping[str, Any]] = {f"names.{key_text(name)}": pairs for name, pairs in recipe.names.items()}
    tables |= {table: entries for table in ("init", "tie", "same") if (entries := getattr(recipe, table))}
    for table, entries in tables.items():
        lines += table_lines(path + table, {key: _own_text(key, value) for key, value in entries.items()})
    if recipe.dims:
        lines += table_lines(f"{path}dims", recipe.dims)
    if any(recipe.carry.values()):
        lines += table_lines(f"{path}carry", recipe.carry)
    if recipe.data:
        lines += table_lines(f"{path}data", {key: _own_text(key, value) for key, value in recipe.data.items()})
    edits = recipe.config.plain()
    if edits or within:
        lines += table_lines(f"{path}config", ({"path": within} if within else {}) | edits)
    for scope in recipe.scopes:
        lines += ["", f"[[{path}scope]]"]
        for name in ("source", "target", "use", *(() if scope.recipe.config else ("config",))):
            if getattr(scope, name):
                lines.append(f"{name} = {quoted(getattr(scope, name))}")
        if scope.inverse:
            lines.append("inverse = true")
        lines += _lines(scope.recipe, f"{path}scope.", None, scope.config if scope.recipe.config else None)
    for stage in recipe.stages:
        lines += ["", f"[[{path}then]]", *_lines(stage, f"{path}then.", "error")]
    return lines


def _own_text(key: str, value: Any) -> str:
    """The text of a value of a recipe: a registered op's, or a file's name."""
    if not isinstance(value, str):
        kind = type(value).__name__
        shown = f"{key!r} is set by an object of type {kind}, which has no text"
        raise RecipeError(Diagnostic("not-text", shown, help="name a registered op, or a file of numbers"))
    return value


def _wrong_kinds(given: Mapping[str, Any], place: str | None) -> list[Diagnostic]:
    """Return a diagnostic for each argument of a recipe that is of another Python type."""
    entries: dict[str, tuple[type | tuple[type, ...], str]] = {
        "rules": ((str, Rule), "rules as text"),
        "drop": (str, "key patterns"),
        "scopes": (Scope, "scopes"),
        "stages": (Recipe, "recipes"),
    }
    values: dict[str, tuple[type, str]] = {
        "init": (object, "target key -> initialiser"),
        "tie": (str, "target key -> target key"),
        "same": (str, "source key -> source key"),
        "dims": (object, "name -> size"),
        "data": (object, "name -> file or numbers"),
        "names": (Mapping, "capture -> {source spelling: target spelling}"),
    }
    rest = given["rest"]
    others = [bad_rest(rest, place)] if rest is not None and not isinstance(rest, str) else []
    found = [text for name in entries for text in wrong_entries(name, given[name], *entries[name])]
    found += [text for name in values for text in wrong_values(name, given[name], *values[name])]
    return [*(Diagnostic("bad-recipe", text, place=place) for text in found), *others]
