"""Arguments of ops and initialisers by name: `[dims]`, and formulas over them and the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from ..language.calls import Call, Expression, Name, Table, Value, parse_call
from ..language.dims import Dims
from ..ops.base import OpError
from ..ops.initialisers import is_word

__all__ = ["Arguments", "settled"]


@dataclass(frozen=True)
class Arguments(Mapping[str, Any]):
    """What a name or a formula stands for where an op takes a number, a list or a table.

    >>> arguments = Arguments(Dims({"n": 5, "w": 0.3, "grid": [4, 6]}, {"rows": 7}))
    >>> arguments["n"], arguments[Expression("config.rows - n")], arguments["grid"], "m" in arguments
    (5, 2, (4, 6), False)
    """

    dims: Dims

    def __getitem__(self, text: str) -> Any:
        found = self._value(text)
        if found is None:
            raise KeyError(text)
        return found

    def _value(self, text: str) -> Any:
        try:
            found = self.dims.value(text) if text.isidentifier() else self.dims.evaluate(text)
        except RecipeError as error:
            if not isinstance(text, Name | Expression):
                return None  # a quoted text need not be a formula
            raise OpError(error.diagnostics[0].headline) from None
        if found is None and (isinstance(text, Expression) or text in self.dims):
            raise OpError(self._lacking(text), lacks=str(text))
        return found

    def _lacking(self, text: str) -> str:
        formula = self.dims.missing(text) if text in self.dims else None
        why = f" = {formula!r}" if formula else ""
        return f"{str(text)!r}{why} has no number: dims or the config lack what it needs"

    def __iter__(self) -> Iterator[str]:
        return iter(self.dims.numbers)

    def __len__(self) -> int:
        return len(self.dims.numbers)


def settled(text: str, dims: Dims) -> str:
    """The text of an initialiser with numbers in place of names and formulas.

    >>> settled("normal(std=s * 2)", Dims({"s": 0.01})), settled("kaiming_normal(mode=fan_in)", Dims({}))
    ('normal(std=0.02)', 'kaiming_normal(mode=fan_in)')

    Raises:
        RecipeError: the text is no call. OpError: a formula or a name of `dims` that has no number.
    """
    call = parse_call(text)
    values = (*call.args, *(value for _, value in call.keywords))
    if not any(isinstance(value, Name | Expression) for value in values):
        return text
    arguments = Arguments(dims)

    def number(value: Value) -> Value:
        if isinstance(value, Expression) or (isinstance(value, Name) and not is_word(value)):
            found = arguments.get(value)
            return value if found is None else Table(found.items()) if isinstance(found, Mapping) else found
        return value

    return str(Call(call.name, tuple(map(number, call.args)), tuple((k, number(v)) for k, v in call.keywords)))
