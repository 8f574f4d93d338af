"""`name(args)`: how ops and initialisers are written, parsed into plain data and never evaluated.

    call     = name [ "(" [argument ("," argument)*] ")" ]
    argument = [name "="] value
    value    = number | string | true | false | none | name | name ":" name | expression
             | "[" [value ("," value)*] "]" | "{" [key "=" value, …] "}"

A bare name is a string here (`cast(bf16)`), and so is an expression over names of `dims` and the config (`add(1 - w)`,
`slice_rows(0, config.vocab_size)`); planning puts numbers in their place where the op takes numbers. `ids:i` is the
entry of the table or list `ids` for the value that the key captures as `i`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import Diagnostic, RecipeError
from .dims import evaluate

__all__ = ["ArgumentTable", "Call", "Expression", "Indexed", "Name", "Value", "parse_call", "parts_of"]


class Name(str):
    """A bare word among the arguments, as against a quoted string."""

    __slots__ = ()


class Expression(str):
    """A formula among the arguments, over numbers, names of `dims` and the config."""

    __slots__ = ()


class Indexed(str):
    """The entry of a table or a list that a captured name picks, `ids:i`; an entry of that entry, `t:b:i`."""

    __slots__ = ()

    @property
    def table(self) -> str:
        """The name of the table."""
        return self.partition(":")[0]

    @property
    def markers(self) -> tuple[str, ...]:
        """The captured names, the one that picks first in front."""
        return tuple(self.split(":")[1:])


class ArgumentTable(tuple[tuple[str, "Value"], ...]):
    """A table among the arguments, as its pairs in order."""

    __slots__ = ()


Value = int | float | str | bool | None | tuple["Value", ...] | ArgumentTable


@dataclass(frozen=True, slots=True)
class Call:
    """An op or an initialiser by name, with its arguments.

    >>> call = parse_call("resize_pos_embed(grid=[16, 16], prefix=1)")
    >>> call.name, dict(call.keywords)["grid"], str(call)
    ('resize_pos_embed', (16, 16), 'resize_pos_embed(grid=[16, 16], prefix=1)')
    """

    name: str
    args: tuple[Value, ...] = ()
    keywords: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        shown = [_format(v) for v in self.args] + [f"{k}={_format(v)}" for k, v in self.keywords]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<indexed>[^\W\d]\w*(?::[^\W\d]\w*)+)"
    r"|(?P<name>[^\W\d]\w*)"
    r"|(?P<string>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')"
    r"|(?P<mark>[()\[\]{},=]))"
)
_PLAIN = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?|[^\W\d]\w*")
_FORMULA = re.compile(r"[-+*/?().\w\s]+")
_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


def parse_call(text: str) -> Call:
    """Parse `name(args)`.

    >>> parse_call("cast(bf16)")
    Call(name='cast', args=('bf16',), keywords=())

    Raises:
        RecipeError: the text is no call; the diagnostic points at the place.
    """
    return _Parser(text).call()


_DEPTH = 32


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0
        self.given: set[str] = set()

    def call(self) -> Call:
        kind, name = self.next()
        if kind != "name":
            raise self.error("a name was expected")
        args: list[Value] = []
        keywords: list[tuple[str, Value]] = []
        if self.peek() == "(":
            self.next()
            while self.peek() != ")":
                self.argument(args, keywords)
                if self.peek() not in (",", ")"):
                    raise self.error("a comma or a closing parenthesis was expected")
                if self.peek() == ",":
                    self.next()
            self.next()
        if self.text[self.at :].strip():
            raise self.error("nothing was expected here")
        return Call(name, tuple(args), tuple(keywords))

    def argument(self, args: list[Value], keywords: list[tuple[str, Value]]) -> None:
        value = self.value()
        if self.peek() != "=":
            if keywords:
                raise self.error("a positional argument stands behind a named one")
            args.append(value)
            return
        if not isinstance(value, Name) or value in self.given:
            raise self.error("a new argument name was expected before '='")
        self.next()
        self.given.add(value)
        keywords.append((str(value), self.value()))

    def value(self) -> Value:
        formula = self.formula()
        if formula is not None:
            return formula
        kind, token = self.next()
        if kind == "number":
            if len(token) > 400:
                raise self.error("a number of so many digits was not expected")
            number = float(token) if any(c in token for c in ".eE") else int(token)
            if abs(number) == float("inf"):
                raise self.error("a number that is not infinite was expected")
            return number
        if kind == "name":
            return _WORDS[token] if token in _WORDS else Name(token)
        if kind == "indexed":
            return Indexed(token)
        if kind == "string":
            return re.sub(r"\\(.)", r"\1", token[1:-1])
        if token not in ("[", "{"):
            raise self.error("a value was expected")
        self.depth += 1
        if self.depth > _DEPTH:
            raise self.error("lists are nested too deep")
        made: Value = tuple(self.items("]")) if token == "[" else ArgumentTable(self.pairs())
        self.depth -= 1
        return made

    def formula(self) -> Expression | None:
        """The text up to the next mark, where it is more than one number or name and reads like a formula."""
        depth, end = 0, self.at
        while end < len(self.text) and _FORMULA.match(self.text[end]):
            depth += {"(": 1, ")": -1}.get(self.text[end], 0)
            if depth < 0:
                break
            end += 1
        body = self.text[self.at : end].strip()
        if not body or _PLAIN.fullmatch(body) or not ("." in body or any(mark in body for mark in "+-*/?(")):
            return None
        try:
            evaluate(body, {})
        except RecipeError as error:
            raise self.error(error.diagnostics[0].headline) from None
        self.at = end
        return Expression(body)

    def items(self, end: str) -> list[Value]:
        found: list[Value] = []
        while self.peek() != end:
            found.append(self.value())
            if self.peek() == ",":
                self.next()
            elif self.peek() != end:
                raise self.error(f"a comma or '{end}' was expected")
        self.next()
        return found

    def pairs(self) -> list[tuple[str, Value]]:
        found: list[tuple[str, Value]] = []
        while self.peek() != "}":
            key = self.value()
            if self.peek() != "=":
                raise self.error("'=' was expected")
            self.next()
            found.append((str(key), self.value()))
            if self.peek() == ",":
                self.next()
        self.next()
        return found

    def peek(self) -> str:
        match = _TOKEN.match(self.text, self.at)
        return match.group(match.lastgroup or 0) if match else ""

    def next(self) -> tuple[str, str]:
        match = _TOKEN.match(self.text, self.at)
        if match is None or match.lastgroup is None:
            raise self.error("the text ends too early" if not self.text[self.at :].strip() else "not understood")
        self.at = match.end()
        return match.lastgroup, match.group(match.lastgroup)

    def error(self, message: str) -> RecipeError:
        return RecipeError(
            Diagnostic("bad-call", f"{message} in {self.text!r}", notes=(self.text, " " * self.at + "^"))
        )


def parts_of(call: Call) -> Iterator[Value]:
    """All values among the arguments of a call, those inside of lists and tables too.

    >>> list(parts_of(parse_call("f(a, [b, 1], c={d=e})")))
    ['a', 'b', 1, 'e']
    """
    open_ones: list[Value] = [*(value for _, value in reversed(call.keywords)), *reversed(call.args)]
    while open_ones:
        value = open_ones.pop()
        if isinstance(value, ArgumentTable):
            open_ones += [part for _, part in reversed(value)]
        elif isinstance(value, tuple):
            open_ones += reversed(value)
        else:
            yield value


def _format(value: Value) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, Name | Expression | Indexed):
        return str(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, ArgumentTable):
        return "{" + ", ".join(f"{_format(k)}={_format(v)}" for k, v in value) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_format, value)) + "]"
    return repr(value)
