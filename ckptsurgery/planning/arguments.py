"""Arguments of ops and initialisers by name: `[dims]`, `[data]`, and formulas over names, indices and the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from ..errors import RecipeError
from ..language.calls import ArgumentTable, Call, Expression, Indexed, Name, Value, parse_call
from ..language.dims import Dims, is_number
from ..ops.base import OpError
from ..ops.initialisers import is_word
from ..ops.listing import Listing
from .recipe_data import DataEntry

__all__ = ["Arguments", "Captured", "settled"]


@dataclass(frozen=True)
class Captured:
    """A value that a key captures.

    Args:
        texts: its spellings, on either side of the rule.
        number: the integer that it is, where it is one.
        position: its place among the choices, where it is one of a list.
    """

    texts: tuple[str, ...]
    number: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class Arguments(Mapping[str, Any]):
    """What a name or a formula stands for where an op takes a number, a list or a table.

    >>> arguments = Arguments(Dims({"n": 5, "w": 0.3, "grid": [4, 6]}, {"rows": 7}))
    >>> arguments["n"], arguments[Expression("config.rows - n")], arguments["grid"], "m" in arguments
    (5, 2, <Listing grid: 2 numbers>, False)
    >>> by_layer = Arguments(Dims({"t": {"0": 0.1, "7": 0.9}}), captured={"i": Captured(("7",), 7)})
    >>> by_layer[Indexed("t:i")], by_layer[Expression("i / 14")]
    (0.9, 0.5)

    Args:
        dims: the names of `[dims]`, over the config.
        data: the names of `[data]`.
        captured: the values that the keys of this step capture.
    """

    dims: Dims
    data: Mapping[str, DataEntry] = field(default_factory=dict)
    captured: Mapping[str, Captured] = field(default_factory=dict)

    def __getitem__(self, text: str) -> Any:
        if isinstance(text, Indexed):
            return self._entry(text)
        found = self._listed(text)
        found = self._value(text) if found is None else found
        if found is None:
            raise KeyError(text)
        return found

    def _listed(self, name: str) -> Any:
        """The numbers of `[data]`."""
        if name not in self.data:
            return None
        try:
            return self.data[name].numbers
        except RecipeError as error:
            found = error.diagnostics[0]
            raise OpError(found.headline, code=found.code, help=found.help) from None

    def _entry(self, asked: Indexed) -> Any:
        """The entry of a list or a table for the value that the key captures."""
        for marker in asked.markers:
            if marker not in self.captured:
                raise OpError(f"{asked}: no key on both sides captures {marker!r}")
        found = self._listed(asked.table)
        found = self._value(Name(asked.table)) if found is None else found
        if found is None:
            raise OpError(f"{asked}: neither dims nor data name {asked.table!r}", lacks=asked.table)
        for marker in asked.markers:
            place = self.captured[marker]
            entry = _picked(found, place)
            if entry is None:
                raise OpError(f"{asked}: {asked.table!r} has no entry for {marker} = {place.texts[0]}")
            found = entry
        return Listing(found, str(asked)) if isinstance(found, tuple) else found

    def _value(self, text: str) -> Any:
        dims = self.dims.given({n: c.number for n, c in self.captured.items() if c.number is not None})
        try:
            found = dims.value(text) if text.isidentifier() else dims.evaluate(text)
        except RecipeError as error:
            if not isinstance(text, Name | Expression):
                return None  # a quoted text need not be a formula
            raise OpError(error.diagnostics[0].headline) from None
        if found is None and (isinstance(text, Expression) or text in self.dims):
            raise OpError(self._lacking(text), lacks=str(text))
        if isinstance(found, tuple) and text.isidentifier() and all(map(is_number, found)):
            return Listing(cast("tuple[int | float, ...]", found), text)
        return found

    def _lacking(self, text: str) -> str:
        formula = self.dims.missing(text) if text in self.dims else None
        why = f" = {formula!r}" if formula else ""
        return f"{str(text)!r}{why} has no number: dims or the config lack what it needs"

    def __iter__(self) -> Iterator[str]:
        return iter(self.dims.numbers)

    def __len__(self) -> int:
        return len(self.dims.numbers)


def _picked(table: Any, place: Captured) -> Any:
    """The entry of a table or a list for a captured value; `*` in a table stands for all that it does not name."""
    if isinstance(table, Mapping):
        return next((table[text] for text in (*place.texts, "*") if text in table), None)
    at = place.number if place.position is None else place.position
    return table[at] if isinstance(table, tuple) and at is not None and at < len(table) else None


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
            return value if found is None else ArgumentTable(found.items()) if isinstance(found, Mapping) else found
        return value

    return str(Call(call.name, tuple(map(number, call.args)), tuple((k, number(v)) for k, v in call.keywords)))
