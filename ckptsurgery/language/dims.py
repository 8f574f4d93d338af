"""Expressions over a checkpoint's config: `config.a.b`, `+ - * //`, `??`; parsed, never evaluated by Python.

expression = sum ("??" sum)*            # ?? : the right side where the left is absent or null
sum        = product (("+" | "-") product)*
product    = atom (("*" | "//") atom)*  # // must be exact
atom       = integer | name | "config" ("." part)+ | "(" expression ")"
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from ..errors import Diagnostic, RecipeError

__all__ = ["DimValue", "Dims", "evaluate"]

DimValue = int | str | Sequence["int | str"] | Mapping[str, "int | str"]
Solved = int | tuple[int, ...] | dict[str, int]

_MOST_DIGITS = 18
_LARGEST = 1 << 63
_DEPTH = 32
_TOKEN = re.compile(r"\s*(\?\?|//|[-+*()]|\d+|[^\W\d]\w*(?:\.\w+)*)")


def evaluate(expression: str, config: Mapping[str, Any] | None, names: Callable[[str], Any] | None = None) -> Any:
    """The value of an expression, an integer or a list of integers; None where a config entry is absent or null.

    >>> evaluate("config.head_dim ?? config.hidden // config.heads", {"hidden": 64, "heads": 4, "head_dim": None})
    16

    Raises:
        RecipeError: bad syntax, an inexact division, or a value that is no number.
    """
    return _Expression(expression, config, names or (lambda name: None)).value()


class _Expression:
    def __init__(self, text: str, config: Mapping[str, Any] | None, names: Callable[[str], Any]) -> None:
        self.text, self.config, self.names = text, config or {}, names
        self.tokens = _TOKEN.findall(text)
        if _TOKEN.sub("", text).strip():
            raise self.error("not understood", "config.a.b, integers, names of dims, + - * // ?? and parentheses")
        self.at = self.depth = 0

    def value(self) -> Any:
        if len(self.tokens) > 256 or any(len(token) > _MOST_DIGITS for token in self.tokens if token.isdecimal()):
            raise self.error("too long")
        value = self.choice()
        if self.at < len(self.tokens):
            raise self.error(f"{self.tokens[self.at]!r} was not expected")
        return value

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ""

    def choice(self) -> Any:
        value = self.sum()
        while self.peek() == "??":
            self.take()
            other = self.sum()
            value = other if value is None else value
        return value

    def sum(self) -> Any:
        value = self.product()
        while self.peek() in ("+", "-"):
            operation = self.plus if self.take() == "+" else self.minus
            value = self.apply(value, self.product(), operation)
        return value

    def product(self) -> Any:
        value = self.atom()
        while self.peek() in ("*", "//"):
            operation = self.times if self.take() == "*" else self.exact
            value = self.apply(value, self.atom(), operation)
        return value

    def atom(self) -> Any:
        token = self.take()
        if token == "(":
            self.depth += 1
            if self.depth > _DEPTH:
                raise self.error("nested too deep")
            value = self.choice()
            self.depth -= 1
            if self.take() != ")":
                raise self.error("a parenthesis is never closed")
            return value
        if token.isdecimal():
            return int(token)
        if token.startswith("config."):
            return self.look_up(token.split(".")[1:])
        if token.isidentifier():
            return self.names(token)
        raise self.error(f"{token!r} was not expected" if token else "it ends too early")

    def look_up(self, path: list[str]) -> Any:
        node: Any = self.config
        for part in path:
            if isinstance(node, Mapping):
                node = node.get(part)
            elif isinstance(node, list | tuple) and part.isdecimal() and len(part) < 10 and int(part) < len(node):
                node = node[int(part)]
            else:
                return None
        if isinstance(node, list | tuple) and all(type(n) is int for n in node):
            return tuple(map(self.bounded, node))
        if isinstance(node, float) and node.is_integer():
            node = int(node)
        if node is None or type(node) is int:
            return node if node is None else self.bounded(node)
        raise self.error(f"config.{'.'.join(path)} is {reprlib.repr(node)}, no integer")

    def apply(self, a: Any, b: Any, operation: Callable[[int, int], int]) -> Any:
        if a is None or b is None:
            return None
        if isinstance(a, tuple) or isinstance(b, tuple):
            size = len(a) if isinstance(a, tuple) else len(b)
            left = a if isinstance(a, tuple) else (a,) * size
            right = b if isinstance(b, tuple) else (b,) * size
            if len(left) != len(right):
                raise self.error("lists of different lengths")
            return tuple(self.bounded(operation(x, y)) for x, y in zip(left, right))
        return self.bounded(operation(a, b))

    def bounded(self, number: int) -> int:
        if abs(number) > _LARGEST:
            raise self.error("a number beyond 64 bits")
        return number

    @staticmethod
    def plus(a: int, b: int) -> int:
        return a + b

    @staticmethod
    def minus(a: int, b: int) -> int:
        return a - b

    @staticmethod
    def times(a: int, b: int) -> int:
        return a * b

    def exact(self, a: int, b: int) -> int:
        if b == 0 or a % b:
            raise self.error(f"{a} // {b} is not exact")
        return a // b

    def error(self, message: str, help: str | None = None) -> RecipeError:
        return RecipeError(Diagnostic("bad-dim", f"{message}: {self.text!r}", help=help))


@dataclass(frozen=True)
class Dims:
    """The sizes that a recipe knows by name, evaluated over one config.

    >>> dims = Dims({"g": "config.kv ?? config.heads", "rows": {"q": 8, "k": "g * 2"}, "b": [2, 3]}, {"heads": 4})
    >>> dims.get("g"), dims.get("rows"), dims.get("b"), dims.get("z")
    (4, {'q': 8, 'k': 8}, (2, 3), None)

    Args:
        values: integers, lists, tables by choice, or expressions.
        config: what `config.` refers to.
        outer: the sizes of the recipe around this one, over a config of their own.
    """

    values: Mapping[str, DimValue]
    config: Mapping[str, Any] | None = None
    outer: Dims | None = None
    _solved: dict[str, Solved | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def get(self, name: str) -> Solved | None:
        """The size of `name`; None where the recipe does not name it or the config lacks what it needs."""
        if name not in self.values and self.outer is not None:
            return self.outer.get(name)
        found = self._solve(name, ())
        parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else (found,)
        if any(part is not None and part < 0 for part in parts):
            raise RecipeError(Diagnostic("bad-dim", f"dims.{name} = {found}: a size is not negative"))
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.values or (self.outer is not None and name in self.outer)

    def missing(self, name: str) -> str | None:
        """The expression that stays without a value for `name`, for a diagnostic."""
        if name not in self.values and self.outer is not None:
            return self.outer.missing(name)
        value = self.values.get(name)
        return str(value) if value is not None and self.get(name) is None else None

    @property
    def numbers(self) -> dict[str, int]:
        """Those names that are plain integers: what may stand in `{i+n}` and `{i:0..n}`."""
        solved = {name: self.get(name) for name in self.values}
        own = {name: value for name, value in solved.items() if isinstance(value, int)}
        return {**(self.outer.numbers if self.outer else {}), **own}

    def _solve(self, name: str, open_names: tuple[str, ...]) -> Solved | None:
        # Kept, since a name may stand twice in each of many expressions that refer to each other.
        if name not in self._solved:
            self._solved[name] = self._solve_anew(name, open_names)
        return self._solved[name]

    def _solve_anew(self, name: str, open_names: tuple[str, ...]) -> Solved | None:
        if len(open_names) > _DEPTH:
            raise RecipeError(Diagnostic("bad-dim", f"dims refer to each other over more than {_DEPTH} steps"))
        if name in open_names:
            raise RecipeError(
                Diagnostic("bad-dim", f"dims refer to each other in a circle: {' -> '.join((*open_names, name))}")
            )
        if name not in self.values:
            return self.outer.get(name) if self.outer is not None else None
        value = self.values[name]
        chain = (*open_names, name)
        if isinstance(value, Mapping):
            table = {choice: self._one(v, chain) for choice, v in value.items()}
            return {c: n for c, n in table.items() if isinstance(n, int)} if None not in table.values() else None
        if isinstance(value, str) or type(value) is int:
            return cast(Solved, self._one(value, chain))
        if isinstance(value, Sequence):
            items = [self._one(v, chain) for v in value]
            return tuple(n for n in items if isinstance(n, int)) if None not in items else None
        raise RecipeError(
            Diagnostic("bad-dim", f"dims.{name} = {value!r}: an integer, a list, a table or an expression")
        )

    def _one(self, value: Any, chain: tuple[str, ...]) -> Any:
        if isinstance(value, str):
            return evaluate(value, self.config, lambda name: self._solve(name, chain))
        if type(value) is int:
            return value
        raise RecipeError(Diagnostic("bad-dim", f"{value!r} is no size"))
