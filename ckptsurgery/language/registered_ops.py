"""The inverse of a call of an op, made of texts alone: no key and no size is known here."""

from __future__ import annotations

from itertools import accumulate

from ..errors import Diagnostic, RecipeError
from ..ops.base import Op, OpError
from ..ops.registry import find_op, make_op, op_names, undone_by_name
from .calls import Call, Value, parse_call

__all__ = ["RegisteredOps"]


class RegisteredOps:
    """The op algebra of the registry."""

    def undo(self, call: Call) -> Call | None:
        """The call that undoes `call` but for rounding, None where nothing does."""
        op = _made(call)
        if op is None:
            return _undone_by_name(call)
        undone = op.inverse(None)
        return None if undone is None else parse_call(str(undone))

    def joins(self, call: Call) -> bool:
        """Whether the op takes or gives several tensors at once."""
        op = _made(call)
        return find_op(call.name).joins if op is None else op.joins


def _made(call: Call) -> Op | None:
    """The op of a call; None where an argument may be a name or a formula, whose number is not known here.

    Raises:
        RecipeError: no such op, or arguments that it does not take.
    """
    try:
        return make_op(call.name, call.args, dict(call.keywords))
    except OpError as error:
        if call.name in op_names() and any(map(_named, (*call.args, *(value for _, value in call.keywords)))):
            return None
        raise RecipeError(Diagnostic("bad-op", str(error), notes=(str(call),))) from None


def _named(value: Value) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple) and any(map(_named, value)))


def _undone_by_name(call: Call) -> Call | None:
    """The inverse of an op over a name or a formula, itself over a formula."""
    undone = undone_by_name(call.name, call.args, dict(call.keywords))
    if undone is not None:
        return Call(undone[0], (), tuple(undone[1].items()))
    given = [str(value) for value in (*call.args, *(value for _, value in call.keywords))]
    sign = find_op(call.name).undone_by
    if sign is None or len(given) != 1:
        return None
    rest = given[0].removeprefix(sign)
    if rest != given[0] and (rest.isidentifier() or _enclosed(rest)):  # an inverse itself
        return parse_call(f"{call.name}({rest[1:-1] if _enclosed(rest) else rest})")
    return parse_call(f"{call.name}({sign}{rest if rest.isidentifier() else f'({given[0]})'})")


def _enclosed(text: str) -> bool:
    """Whether one pair of parentheses encloses all of a formula."""
    inside = text[1:-1]
    depths = list(accumulate({"(": 1, ")": -1}.get(character, 0) for character in inside))
    return text[:1] == "(" and text[-1:] == ")" and min(depths, default=0) >= 0
