"""The changes that a plan makes to the config that goes along: its recipe's edits, with numbers for expressions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..errors import Diagnostic, RecipeError
from ..language.config_edits import ConfigEdits, literal_of
from ..language.dims import Dims

__all__ = ["BoundEdits", "ConfigChange", "changed_config", "settled_edits"]

_SHOWN = 8


@dataclass(frozen=True)
class BoundEdits:
    """Edits of a config with the sizes that they may name.

    Args:
        path: where in the whole config their paths begin; empty for the whole.
    """

    edits: ConfigEdits
    dims: Dims
    path: str = ""
    place: str | None = None


class ConfigChange(NamedTuple):
    """One change of a config.

    Args:
        path: of the field. value: the new path of a renamed field, the value of one that is set; None for a field
            whose expression has no value.
    """

    kind: Literal["drop", "rename", "set"]
    path: str
    value: Any = None


def settled_edits(
    edits: Iterable[BoundEdits], sizes: Mapping[str, int], problems: list[Diagnostic]
) -> tuple[ConfigChange, ...]:
    """The changes, in the order in which they are made.

    Args:
        sizes: of axes and of captured indices, where each has one.
        problems: receives expressions that do not parse.
    """
    made: list[ConfigChange] = []
    for bound in edits:
        dims = bound.dims.given(sizes)
        below = f"{bound.path}." if bound.path else ""
        made += [ConfigChange("drop", below + path) for path in bound.edits.drop]
        made += [ConfigChange("rename", below + old, below + new) for old, new in bound.edits.rename.items()]
        for path, value in bound.edits.set.items():
            try:
                made.append(ConfigChange("set", below + path, _value(value, dims)))
            except RecipeError as error:
                told = error.diagnostics[0]
                text = f"[config] {path} = {value!r}: {told.headline}"
                help = _literal(value) if isinstance(value, str) else told.help
                problems.append(Diagnostic("bad-recipe", text, place=bound.place, help=help))
    return tuple(made)


def _literal(text: str) -> str:
    return f"a text is an expression; quote a literal: \"'{text}'\""


def _value(value: Any, dims: Dims) -> Any:
    if isinstance(value, Mapping):
        return {name: _value(part, dims) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_value(part, dims) for part in value]
    if not isinstance(value, str):
        return value
    literal = literal_of(value)
    if literal is not None:
        return literal
    found = dims.value(value) if value.isidentifier() else dims.evaluate(value)
    if found is None and value.isidentifier() and value not in dims:
        text = f"neither dims, nor an axis, nor a captured index is called {value!r}"
        raise RecipeError(Diagnostic("bad-recipe", text, help=_literal(value)))
    return list(found) if isinstance(found, tuple) else found


def changed_config(config: Mapping[str, Any], changes: Iterable[ConfigChange]) -> dict[str, Any]:
    """The config after the changes; the one that is given stays as it is.

    >>> changed_config({"a": {"b": 1}, "c": 2}, [ConfigChange("rename", "a.b", "a.d"), ConfigChange("set", "e.f", 3)])
    {'a': {'d': 1}, 'c': 2, 'e': {'f': 3}}
    """
    made: dict[str, Any] = _copied(config)
    for kind, path, value in changes:
        if kind == "set":
            if value is not None:
                _put(made, path, value)
            continue
        owner, name = _owner(made, path)
        if owner is None or name not in owner:
            continue
        if kind == "drop":
            del owner[name]
        elif (target := _owner(made, value)) == (owner, str(value).rpartition(".")[2]):
            # a renamed field keeps its place among the others
            fields = {target[1] if old == name else old: part for old, part in owner.items() if old != target[1]}
            owner.clear()
            owner.update(fields)
        else:
            _put(made, value, owner.pop(name))
    return made


def _copied(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {name: _copied(part) for name, part in node.items()}
    return list(map(_copied, node)) if isinstance(node, list) else node


def _owner(config: dict[str, Any], path: str) -> tuple[dict[str, Any] | None, str]:
    """The table that holds the field of a path, and the field's name."""
    *above, name = path.split(".")
    node: Any = config
    for part in above:
        node = node.get(part) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), name


def _put(config: dict[str, Any], path: str, value: Any) -> None:
    *above, name = path.split(".")
    node = config
    for part in above:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[name] = value


def shown(changes: Iterable[ConfigChange]) -> Iterator[str]:
    """One line for each change."""
    for kind, path, value in changes:
        if kind == "drop":
            yield f"{path} dropped"
        elif kind == "rename":
            yield f"{path} -> {value}"
        elif isinstance(value, list) and len(value) > _SHOWN:
            yield f"{path} = a list of {len(value)}"
        else:
            yield f"{path} = {value}" if value is not None else f"{path} is not set: its expression has no value"
