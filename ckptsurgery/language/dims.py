"""Expressions over a checkpoint's config: `config.a.b`, `+ - * / //`, `??`; parsed, never evaluated by Python.

expression = sum ("??" sum)*            # ?? : the right side where the left is absent or null
sum        = product (("+" | "-") product)*
product    = atom (("*" | "/" | "//") atom)*  # // must be exact
atom       = number | name | "config" ("." part)+ | "(" expression ")" | "-" atom
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from ..errors import Diagnostic, RecipeError

__all__ = ["DimValue", "Dims", "Known", "evaluate", "is_dim", "is_number", "words_in"]

Single = int | float | str
DimValue = Single | Sequence["Single | Sequence[Single]"] | Mapping[str, "Single | Sequence[Single]"]
"""A number, a list, a table by choice or index, or a list or table of lists, which ops take and sizes do not."""
Number = int | float
Solved = int | tuple[int, ...] | dict[str, int]
Entry = Number | tuple[Number, ...]
Known = Entry | tuple[Entry, ...] | dict[str, Entry]

_MOST_DIGITS = 18
_LARGEST = 1 << 63
_DEPTH = 32
_TOKEN = re.compile(r"\s*(\?\?|//|[-+*/()]|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|[^\W\d]\w*(?:\.\w+)*)")


def is_number(value: object) -> bool:
    """Whether a value is an integer or a finite float, and not a boolean."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def is_dim(value: object) -> bool:
    """Whether a value may stand in `[dims]`.

    >>> is_dim(0.3), is_dim("config.n"), is_dim([1, "n"]), is_dim({"0": [1, 2], "1": []}), is_dim([[1], 2, [[3]]])
    (True, True, True, True, False)
    """
    return all(isinstance(part, str) or is_number(part) for part in _flat(value, 2))


def _flat(value: object, depth: int) -> Iterator[object]:
    """The values in a list or a table, of lists within them too."""
    if (depth and isinstance(value, list | tuple)) or (depth == 2 and isinstance(value, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _flat(part, depth - 1)
    else:
        yield value


def evaluate(expression: str, config: Mapping[str, Any] | None, names: Callable[[str], Any] | None = None) -> Any:
    """The value of an expression, a number or a list of numbers; None where a config entry is absent or null.

    >>> evaluate("config.head_dim ?? config.hidden // config.heads", {"hidden": 64, "heads": 4, "head_dim": None})
    16

    Raises:
        RecipeError: bad syntax, an inexact division, or a value that is no number.
    """
    return _DimsExpression(expression, config, names or (lambda name: None)).value()


class _DimsExpression:
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
        operations = {"*": self.times, "/": self.over, "//": self.exact}
        while self.peek() in operations:
            operation = operations[self.take()]
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
        if token == "-":
            return self.apply(0, self.atom(), self.minus)
        if token[:1].isdecimal():
            return int(token) if token.isdecimal() else self.bounded(float(token))
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
        if isinstance(node, list | tuple) and all(map(is_number, node)):
            return tuple(map(self.bounded, node))
        if isinstance(node, float) and node.is_integer():
            node = int(node)
        if node is None or is_number(node):
            return node if node is None else self.bounded(node)
        raise self.error(f"config.{'.'.join(path)} is {reprlib.repr(node)}, no number")

    def apply(self, a: Any, b: Any, operation: Callable[[Number, Number], Number]) -> Any:
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

    def bounded(self, number: Number) -> Number:
        if abs(number) > _LARGEST:
            raise self.error("a number beyond 64 bits")
        return number

    @staticmethod
    def plus(a: Number, b: Number) -> Number:
        return a + b

    @staticmethod
    def minus(a: Number, b: Number) -> Number:
        return a - b

    @staticmethod
    def times(a: Number, b: Number) -> Number:
        return a * b

    def over(self, a: Number, b: Number) -> Number:
        if b == 0:
            raise self.error("a division by 0")
        return a / b

    def exact(self, a: Number, b: Number) -> Number:
        if b == 0 or a % b:
            raise self.error(f"{a} // {b} is not exact")
        return a // b

    def error(self, message: str, help: str | None = None) -> RecipeError:
        return RecipeError(Diagnostic("bad-dim", f"{message}: {self.text!r}", help=help))


@dataclass(frozen=True)
class Dims:
    """The sizes and other numbers that a recipe knows by name, evaluated over one config.

    >>> dims = Dims({"g": "config.kv ?? config.heads", "rows": {"q": 8, "k": "g * 2"}, "b": [2, 3]}, {"heads": 4})
    >>> dims.get("g"), dims.get("rows"), dims.get("b"), dims.get("z")
    (4, {'q': 8, 'k': 8}, (2, 3), None)

    Args:
        values: numbers, lists, tables by choice, or expressions.
        config: what `config.` refers to.
        outer: the sizes of the recipe around this one, over a config of their own.
    """

    values: Mapping[str, DimValue]
    config: Mapping[str, Any] | None = None
    outer: Dims | None = None
    _solved: dict[str, Known | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def get(self, name: str) -> Solved | None:
        """The size of `name`; None where the recipe does not name it or the config lacks what it needs.

        Of a table the choices whose size is known.

        Raises:
            RecipeError: a number that is not a size: negative, or not an integer.
        """
        found = self.value(name)
        parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else (found,)
        for part in parts:
            if isinstance(part, tuple):
                raise RecipeError(Diagnostic("bad-dim", f"dims.{name} is a table of lists, and not a size"))
            if part is not None and (part < 0 or part != int(part)):
                kind = "negative" if part < 0 else "a fraction"
                raise RecipeError(Diagnostic("bad-dim", f"dims.{name} = {found}: a size is not {kind}"))
        if isinstance(found, dict):
            return {choice: int(cast(Number, part)) for choice, part in found.items()} or None
        if isinstance(found, tuple):
            return tuple(int(cast(Number, part)) for part in found)
        return None if found is None else int(found)

    def value(self, name: str) -> Known | None:
        """The number, list or table behind `name`; None where there is none, or where the config lacks what it needs.

        >>> Dims({"w": 0.3, "v": "1 - w"}).value("v")
        0.7
        """
        if name not in self.values and self.outer is not None:
            return self.outer.value(name)
        return self._solve(name, ())

    def given(self, numbers: Mapping[str, int]) -> Dims:
        """These names with numbers for names that are not in them, such as the index that a key captures.

        >>> Dims({"t": "i / (n - 1)", "n": 5}).given({"i": 2}).value("t")
        0.5
        """
        outer = self.outer.given(numbers) if self.outer is not None else None
        own = {name: number for name, number in numbers.items() if name not in self}
        return Dims({**own, **self.values}, self.config, outer)

    def asked_by(self, text: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        """The names that are not in these, and that a name or an expression needs.

        >>> sorted(Dims({"t": "i / (n - 1)", "n": 5}).asked_by("t + x"))
        ['i', 'x']
        """
        found: set[str] = set()
        for word in words_in(text):
            if word in seen or word.startswith("config."):
                continue
            if word in self.values:
                for part in _texts(self.values[word]):
                    found |= self.asked_by(part, seen | {word})
            else:
                found |= self.outer.asked_by(word, seen) if self.outer is not None else {word}
        return frozenset(found)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression over these names and the config; None where something in it has none.

        Raises:
            RecipeError: as for `evaluate`.
        """
        return evaluate(expression, self.config, self.value)

    def __contains__(self, name: str) -> bool:
        return name in self.values or (self.outer is not None and name in self.outer)

    def missing(self, name: str) -> str | None:
        """The expression that has no value for `name`, or none for one of its choices, for a diagnostic."""
        if name not in self.values and self.outer is not None:
            return self.outer.missing(name)
        value = self.values.get(name)
        if value is None:
            return None
        found = self.value(name)
        known = found is not None and not (
            isinstance(found, dict) and isinstance(value, Mapping) and found.keys() < value.keys()
        )
        return None if known else str(value)

    def asks_config(self, name: str, seen: frozenset[str] = frozenset()) -> bool:
        """Whether `name` has no value because there is no config."""
        if name not in self.values:
            return self.outer is not None and self.outer.asks_config(name, seen)
        if self.config or self.missing(name) is None or name in seen:
            return False
        words = [word for text in _texts(self.values[name]) for word in _WORDS.findall(text)]
        return any(w.startswith("config.") or self.asks_config(w, seen | {name}) for w in words)

    @property
    def numbers(self) -> dict[str, int]:
        """Those names that are plain integers: what may stand in `{i+n}` and `{i:0..n}`."""
        solved = {name: self.value(name) for name in self.values}
        own = {name: value for name, value in solved.items() if isinstance(value, int)}
        return {**(self.outer.numbers if self.outer is not None else {}), **own}

    def _solve(self, name: str, open_names: tuple[str, ...]) -> Known | None:
        # Kept, since a name may stand twice in each of many expressions that refer to each other.
        if name not in self._solved:
            self._solved[name] = self._solve_anew(name, open_names)
        return self._solved[name]

    def _solve_anew(self, name: str, open_names: tuple[str, ...]) -> Known | None:
        if len(open_names) > _DEPTH:
            raise RecipeError(Diagnostic("bad-dim", f"dims refer to each other over more than {_DEPTH} steps"))
        if name in open_names:
            raise RecipeError(
                Diagnostic("bad-dim", f"dims refer to each other in a circle: {' -> '.join((*open_names, name))}")
            )
        if name not in self.values:
            return self.outer.value(name) if self.outer is not None else None
        value = self.values[name]
        chain = (*open_names, name)
        if isinstance(value, Mapping):
            table = {choice: self._entry(name, v, chain) for choice, v in value.items()}
            return {choice: entry for choice, entry in table.items() if entry is not None} or None
        if isinstance(value, str) or is_number(value):
            return cast(Known, self._one(value, chain))
        if isinstance(value, Sequence):
            items = [self._entry(name, v, chain) for v in value]
            return None if None in items else cast(Known, tuple(items))
        raise RecipeError(Diagnostic("bad-dim", f"dims.{name} = {value!r}: a number, a list, a table or an expression"))

    def _entry(self, name: str, value: Any, chain: tuple[str, ...]) -> Entry | None:
        """The value of one entry of a list or a table: a number, or a list of numbers."""
        if not isinstance(value, list | tuple):
            return self._single(name, value, chain)
        items = [self._single(name, v, chain) for v in value]
        return None if None in items else tuple(n for n in items if n is not None)

    def _single(self, name: str, value: Any, chain: tuple[str, ...]) -> Number | None:
        found = self._one(value, chain)
        if found is not None and not is_number(found):
            raise RecipeError(Diagnostic("bad-dim", f"dims.{name}: {value!r} is {found}, and not one number"))
        return cast("Number | None", found)

    def _one(self, value: Any, chain: tuple[str, ...]) -> Any:
        if isinstance(value, str):
            return evaluate(value, self.config, lambda name: self._solve(name, chain))
        if is_number(value):
            return value
        raise RecipeError(Diagnostic("bad-dim", f"{value!r} is no size"))


_WORDS = re.compile(r"[^\W\d]\w*(?:\.\w+)*")


def _texts(value: object) -> list[str]:
    """The expressions in the value of a name."""
    return [part for part in _flat(value, 2) if isinstance(part, str)]


def words_in(text: str) -> list[str]:
    """The names in an expression, those of the config with their paths.

    >>> words_in("i / (config.n - 1)")
    ['i', 'config.n']
    """
    return _WORDS.findall(text)
