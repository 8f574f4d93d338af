"""A recipe as Python: a function over a state dict that needs torch alone, and an adapter class around two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..catalog import load_recipe
from ..errors import Diagnostic, RecipeError
from ..language.captures import Literal
from ..language.dims import DimValue
from ..language.keys import KeyPattern
from ..language.recipe import Recipe
from ..planning.expanding import BoundPattern, BoundRule, Stage, expand
from .conversion_axes import NotSayable
from .exporting import Side, regex_of, single
from .python_axes import axes_lines

__all__ = ["to_python", "to_state_dict_adapter"]

_LEFT_OVER = '            raise KeyError(f"no rule names {key}")'
_HEAD = '''"""{title}

Written from a recipe; it needs torch alone.
"""

import re

import torch
'''


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

    Its methods are those that torchtitan and AutoModel ask of a state dict adapter; derive from theirs where a file
    reader is wanted too.

    Args:
        name: what the class is called. config, dims: as for `to_python`; all sizes must be settled.

    Raises:
        RecipeError: as for `to_python`, of either direction; and sizes that nothing settles.
    """
    both = [
        *_functions(recipe, "_from_hf", config, dims, closed=True),
        *_functions(recipe.inverse(), "_to_hf", config, dims, closed=True),
    ]
    adapter = f'''class {name}:
    """{recipe.summary or "Names and layouts of two codebases."}"""

    def __init__(self, model_config=None, hf_assets_path=None):
        self.model_config = model_config
        self.hf_assets_path = hf_assets_path

    def from_hf(self, hf_state_dict):
        """The model's own state dict."""
        return _from_hf(hf_state_dict)

    def to_hf(self, state_dict):
        """The state dict of the files."""
        return _to_hf(state_dict)'''
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
            lines.append(f"    used.update(key for key in state if re.fullmatch({_raw(drop.pattern)}, key))")
        for same in self.stage.sames:
            lines += self.same(same)
        lines += self.rests()
        for tie in self.stage.ties:
            lines += self.tie(tie)
        return [*lines, "    return made"]

    def rule(self, bound: BoundRule) -> Iterator[str]:
        source, target = single(bound.rule)
        left = {c.name for c in source.captures}
        right = {c.name for c in target.captures}
        kept = [n for n in dict.fromkeys(c.name for c in source.captures) if n in right]
        pattern = _raw(KeyPattern(source.pieces))
        plain = source.axes == target.axes and left == right
        yield from _tables(source, target)
        if plain:
            yield "    for key, tensor in state.items():"
            yield f"        if match := re.fullmatch({pattern}, key):"
            yield "            used.add(key)"
            yield f"            made[{_key(source, target)}] = tensor"
            return
        gathered = [n for n in dict.fromkeys(c.name for c in source.captures) if n not in right]
        yield "    groups = {}"
        yield "    for key, tensor in state.items():"
        yield f"        if match := re.fullmatch({pattern}, key):"
        yield "            used.add(key)"
        yield f"            at = {_tuple(kept, 'match[{!r}]')}"
        yield f"            groups.setdefault(at, {{}})[{_tuple(gathered, 'match[{!r}]')}] = tensor"
        yield f"    for {_tuple(kept, '{}_', '_')}, parts in groups.items():"
        for line in axes_lines(source, target, gathered, lambda name: self.size(bound, name), _named(source, target)):
            yield f"        {line}"

    def size(self, bound: BoundRule, name: str) -> str:
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
                prefix = f"re.match({_raw(rest.prefix)}, key)" if rest.prefix is not None else "True"
                yield f"        if {prefix}:"
                yield (
                    "            continue"
                    if rest.kind == "drop"
                    else '            raise KeyError(f"no rule names {key}")'
                )
                continue
            try:
                source, target = single(rest.rule.rule)
            except NotSayable as reason:
                self.problems.append(_refused(f"rest = '{rest.rule.text}'", str(reason)))
                continue
            yield from (f"    {line}" for line in _tables(source, target))
            yield f"        if match := re.fullmatch({_raw(KeyPattern(source.pieces))}, key):"
            yield f"            made[{_key(source, target)}] = tensor"
            yield "            continue"
        yield _LEFT_OVER[4:]

    def same(self, same: BoundPattern) -> Iterator[str]:
        """Names that must hold what others do, and are left out."""
        free = "key not in used and " if same.optional else ""
        yield "    for key, tensor in state.items():"
        yield f"        if {free}(match := re.fullmatch({_raw(same.pattern)}, key)):"
        yield f"            if not torch.equal(tensor, state[{_fstring(same.value)}]):"
        yield '                raise ValueError(f"{key} differs from what it should be the same as")'
        yield "            used.add(key)"

    def tie(self, tie: BoundPattern) -> Iterator[str]:
        yield "    for key in list(made):"
        yield f"        if match := re.fullmatch({_raw(tie.value)}, key):"
        yield f"            made.setdefault({_fstring(tie.pattern)}, made[key])"


def _fstring(pattern: KeyPattern) -> str:
    """A key as an expression over `match`."""
    texts = (p.text.replace("{", "{{").replace("}", "}}") if isinstance(p, Literal) else f"{{match[{p.name!r}]}}"
             for p in pattern.pieces)  # fmt: skip
    return 'f"' + "".join(texts) + '"'


def _raw(pattern: KeyPattern) -> str:
    return "r" + repr(regex_of(pattern)).replace("\\\\", "\\")


def _tuple(names: Sequence[str], form: str, empty: str = "()") -> str:
    """Several values as one key of a dict."""
    if not names:
        return empty
    return "(" + ", ".join(form.format(name) for name in names) + ("," if len(names) == 1 else "") + ")"


def _key(source: Side, target: Side) -> str:
    """The target's key as an expression over `match`; choices that are spelled otherwise there by a table."""
    return _spelled(source, target, "match[{!r}]")


def _tables(source: Side, target: Side) -> Iterator[str]:
    """Choices that are spelled otherwise in the target's key."""
    for piece in target.captures:
        first = next((c for c in source.captures if c.name == piece.name), None)
        if first is not None and first.choices and piece.choices and first.choices != piece.choices:
            yield f"    {piece.name}_names = {dict(zip(first.choices, piece.choices))!r}"


def _named(source: Side, target: Side) -> str:
    """The target's key as an expression over the names of its captures."""
    return _spelled(source, target, "{}_")


def _spelled(source: Side, target: Side, form: str) -> str:
    pieces = []
    for piece in target.pieces:
        if isinstance(piece, Literal):
            pieces.append(piece.text.replace("{", "{{").replace("}", "}}"))
            continue
        value = form.format(piece.name)
        first = next((c for c in source.captures if c.name == piece.name), None)
        if first is not None and first.choices and piece.choices and first.choices != piece.choices:
            value = f"{piece.name}_names[{value}]"
        pieces.append(f"{{{value}}}")
    text = "".join(pieces)
    quote = '"""' if "'" in text and '"' in text else "'" if '"' in text else '"'
    return f"f{quote}{text}{quote}"
