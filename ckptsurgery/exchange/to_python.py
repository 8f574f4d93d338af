"""A recipe as Python: a function over a state dict that needs torch alone, and an adapter class around two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..catalog import load_recipe
from ..errors import Diagnostic, RecipeError
from ..language.dims import DimValue
from ..language.keys import KeyPattern
from ..language.recipe import Recipe
from ..language.rules import SAME, Rule
from ..planning.expanding import BoundPattern, ResolvedRule, Stage, expand
from .conversion_axes import NotSayable
from .exporting import RuleSide, each_target, side_of, single
from .python_axes import axes_lines
from .python_keys import matched, raw, spelled, tables, tuple_of, value

__all__ = ["to_python", "to_state_dict_adapter"]

_LEFT_OVER = '            raise KeyError(f"no rule names {key}")'
_HEAD = '''"""{title}

Written from a recipe; it needs torch alone.
"""

import re

import torch
'''


_ADAPTER = '''class {name}:
    """{title}"""

    fqn_to_index_mapping = None

    def __init__(self, model_config=None, hf_assets_path=None):
        self.model_config = model_config
        self.hf_assets_path = hf_assets_path

    def from_hf(self, hf_state_dict, device_mesh=None, **options):
        """Return the model's own state dict."""
        return _from_hf(hf_state_dict)

    def to_hf(self, state_dict, **options):
        """Return the state dict of the files."""
        return _to_hf(state_dict)

    def convert_single_tensor_to_hf(self, fqn, tensor, **options):
        """Return what becomes of one of the model's tensors: pairs of name and tensor."""
        return list(_to_hf({{fqn: tensor}}).items())

    def get_hf_storage_reader(self, path, from_quantized=False):
        """Return the reader of the files."""
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        return HuggingFaceStorageReader(path)'''


def to_python(
    recipe: Recipe,
    name: str = "convert",
    *,
    config: Mapping[str, Any] | None = None,
    dims: Mapping[str, DimValue] | None = None,
) -> str:
    """Return the text of a Python module with a function that does what a recipe says, without this library.

    >>> text = to_python(Recipe(["h.{i}.fc.weight [x y] -> layers.{i}.fc.weight [y x]"]))
    >>> import torch
    >>> module = {}
    >>> exec(text, module)
    >>> list(module["convert"]({"h.0.fc.weight": torch.ones(2, 3)})["layers.0.fc.weight"].shape)
    [3, 2]

    Args:
        name: what the function is called. Sizes that neither `dims` nor `config` settle become keyword arguments of it.
        config: what `config.` means in the recipe's dims. dims: sizes that go before the recipe's own.

    Raises:
        RecipeError: every rule that the function cannot say, with the reason: ops, computed indices, sizes that only a
            target shows.
    """
    functions = _functions(recipe, name, config, dims)
    return "\n\n".join([_HEAD.format(title=recipe.summary or "A conversion of state dicts."), *functions]) + "\n"


def to_state_dict_adapter(
    recipe: Recipe,
    name: str = "StateDictAdapter",
    *,
    config: Mapping[str, Any] | None = None,
    dims: Mapping[str, DimValue] | None = None,
) -> str:
    """Return the text of a Python module with an adapter class: `from_hf` runs the recipe, `to_hf` its inverse.

    Its methods are those that the state dict adapters of torchtitan and of AutoModel have. It needs torch alone.

    Args:
        name: what the class is called. config, dims: as for `to_python`; all sizes must be settled.

    Raises:
        RecipeError: as for `to_python`, of either direction; and sizes that nothing settles.
    """
    both = [
        *_functions(recipe, "_from_hf", config, dims, closed=True),
        *_functions(recipe.inverse(), "_to_hf", config, dims, closed=True),
    ]
    adapter = _ADAPTER.format(name=name, title=recipe.summary or "Names and layouts of two codebases.")
    return "\n\n".join([_HEAD.format(title=recipe.summary or "An adapter of state dicts."), *both, adapter]) + "\n"


def _functions(
    recipe: Recipe,
    name: str,
    config: Mapping[str, Any] | None,
    dims: Mapping[str, DimValue] | None,
    closed: bool = False,
) -> list[str]:
    """The functions of all stages, and the one that calls them."""
    stages = [_Writing(stage) for stage in expand(recipe, load_recipe, config, dims)]
    bodies = [writing.body() for writing in stages]
    problems = [problem for writing in stages for problem in writing.problems]
    if recipe.init:
        problems.append(_refused("[init]", "a tensor that the source has not is the model's affair"))
    asked = dict(pair for writing in stages for pair in writing.asked.items())
    if closed and asked:
        problems += [_refused(f"the size {one}", "nothing settles it; dims=… does") for one in asked]
    if problems:
        raise RecipeError(problems)
    names = [name if len(stages) == 1 else f"{name}_{number}" for number in range(len(stages))]
    found = [_function(n, body, writing.asked) for n, body, writing in zip(names, bodies, stages)]
    if len(stages) > 1:
        calls = [
            f"    state = {n}({', '.join(['state', *(f'{a}={a}' for a in w.asked)])})" for n, w in zip(names, stages)
        ]
        found.append(_function(name, [*calls, "    return state"], asked))
    return found


def _function(name: str, body: Sequence[str], asked: Mapping[str, str]) -> str:
    given = ", ".join(["state", *(["*", *asked] if asked else [])])
    told = "".join(f" {one}: {what}." for one, what in asked.items())
    return "\n".join([f"def {name}({given}):", f'    """Return the converted state dict.{told}"""', *body])


def _refused(what: str, reason: str) -> Diagnostic:
    return Diagnostic("not-exportable", f"a Python function cannot say {what}: {reason}")


@dataclass
class _Writing:
    """One stage, as lines of a function's body."""

    stage: Stage
    problems: list[Diagnostic] = field(default_factory=list)
    asked: dict[str, str] = field(default_factory=dict)

    def body(self) -> list[str]:
        lines = ["    made, used = {}, set()"]
        for bound in self.stage.rules:
            try:
                lines += [f"    # {bound.text}", *self.rule(bound)]
            except NotSayable as reason:
                self.problems.append(_refused(f"'{bound.text}'", str(reason)))
        for drop in self.stage.drops:
            lines.append(f"    used.update(key for key in state if ({matched(drop.pattern.pieces)}))")
        for same in self.stage.sames:
            lines += self.same(same)
        lines += self.rests()
        for tie in self.stage.ties:
            lines += self.tie(tie)
        return [*lines, "    return made"]

    def rule(self, bound: ResolvedRule) -> Iterator[str]:
        rule = bound.rule
        if rule.after == (SAME,) and len(rule.sources) > 1:
            yield from self.proofs(rule)
            rule = replace(rule, sources=rule.sources[:1], after=())
        for source, target in each_target(rule, computed=True):
            yield from self.moved(bound, source, target)

    def proofs(self, rule: Rule) -> Iterator[str]:
        """Each source of a rule must hold what the first one does."""
        first, *others = (side_of(term, computed=True) for term in rule.sources)
        for other in others:
            if {c.name for c in other.captures} != {c.name for c in first.captures} or other.axes != first.axes:
                raise NotSayable("sources of different layouts that hold the same")
            yield "    for key, tensor in state.items():"
            yield f"        if {matched(other.pieces)}:"
            yield "            used.add(key)"
            yield f"            if not torch.equal(tensor, state[{spelled(other, first)}]):"
            yield '                raise ValueError(f"{key} differs from what it should be the same as")'

    def moved(self, bound: ResolvedRule, source: RuleSide, target: RuleSide) -> Iterator[str]:
        left = {c.name: c for c in source.captures}
        right = {c.name for c in target.captures}
        kept = [c for name, c in left.items() if name in right]
        yield from tables(source, target)
        plain = source.axes == target.axes and left.keys() == right
        gathered = [c for name, c in left.items() if name not in right]
        if not plain:
            yield "    groups = {}"
        yield "    for key, tensor in state.items():"
        yield f"        if {matched(source.pieces)}:"
        if not bound.rule.sources[0].shared:
            yield "            used.add(key)"
        if plain:
            yield f"            made[{spelled(source, target)}] = tensor"
            return
        yield f"            at = {tuple_of([value(c) for c in kept])}"
        yield f"            groups.setdefault(at, {{}})[{tuple_of([value(c) for c in gathered])}] = tensor"
        yield f"    for {tuple_of([f'{c.name}_' for c in kept], '_')}, parts in groups.items():"
        for line in self.axes(bound, source, target, [c.name for c in gathered]):
            yield f"        {line}"

    def axes(self, bound: ResolvedRule, source: RuleSide, target: RuleSide, gathered: Sequence[str]) -> Iterator[str]:
        """The lines that make the tensors of a group; those with and without an optional dimension apart."""
        key, size = spelled(source, target, named=True), partial(self.size, bound)
        optional = {*source.optional, *target.optional}
        if not optional:
            yield from axes_lines(source, target, gathered, size, key)
            return
        if len(optional) > 1 or source.axes is None or ("...",) in source.axes or source.optional != target.optional:
            raise NotSayable(f"the optional dimensions {', '.join(sorted(optional))}: the rank does not show them")
        name = optional.pop()
        yield f"if next(iter(parts.values())).dim() == {len(source.axes)}:"
        yield from (f"    {line}" for line in axes_lines(source, target, gathered, size, key))
        yield "else:"
        without = source.without(name), target.without(name)
        yield from (f"    {line}" for line in axes_lines(*without, gathered, size, key))

    def size(self, bound: ResolvedRule, name: str) -> str:
        """A size as text: its number, or the name of an argument; `axis of capture` is one of a table."""
        name, of, marker = name.partition(" of ")
        if of:
            return f"{self.size(bound, name)}[{marker}_]"
        known = bound.dims.get(name)
        if known is not None:
            return repr(known)
        if name not in bound.dims:
            raise NotSayable(f"the size of {name!r} follows from a target alone")
        self.asked[name] = str(bound.dims.values.get(name))
        return name

    def rests(self) -> Iterator[str]:
        """What becomes of the keys that nothing names, those of the longest prefix first."""
        if not self.stage.rests:
            yield "    left = [key for key in state if key not in used]"
            yield "    if left:"
            yield '        raise KeyError(f"no rule names {left[:8]}")'
            return
        yield "    for key, tensor in state.items():"
        yield "        if key in used:"
        yield "            continue"
        for rest in self.stage.rests:
            if rest.rule is None:
                prefix = f"re.match({raw(rest.prefix.pieces)}, key)" if rest.prefix is not None else "True"
                yield f"        if {prefix}:"
                yield (
                    "            continue"
                    if rest.kind == "drop"
                    else '            raise KeyError(f"no rule names {key}")'
                )
                continue
            try:
                source, target = single(rest.rule.rule, computed=True)
            except NotSayable as reason:
                self.problems.append(_refused(f"rest = '{rest.rule.text}'", str(reason)))
                continue
            yield from (f"    {line}" for line in tables(source, target))
            yield f"        if {matched(source.pieces)}:"
            yield f"            made[{spelled(source, target)}] = tensor"
            yield "            continue"
        yield _LEFT_OVER[4:]

    def same(self, same: BoundPattern) -> Iterator[str]:
        """Names that must hold what others do, and are left out."""
        copy, kept = _keys(same.pattern), _keys(same.value)
        free = "key not in used and " if same.optional else ""
        yield from tables(copy, kept)
        yield "    for key, tensor in state.items():"
        yield f"        if {free}({matched(copy.pieces)}):"
        yield f"            if not torch.equal(tensor, state[{spelled(copy, kept)}]):"
        yield '                raise ValueError(f"{key} differs from what it should be the same as")'
        yield "            used.add(key)"

    def tie(self, tie: BoundPattern) -> Iterator[str]:
        base, alias = _keys(tie.value), _keys(tie.pattern)
        yield from tables(base, alias)
        yield "    for key in list(made):"
        yield f"        if {matched(base.pieces)}:"
        yield f"            made.setdefault({spelled(base, alias)}, made[key])"


def _keys(pattern: KeyPattern) -> RuleSide:
    """A pattern as a side of a rule that moves nothing."""
    return RuleSide(tuple(pattern.pieces), None)
