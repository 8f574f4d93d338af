"""The one registry of ops: a dict from name to class, filled by `op` and by nothing else.

The modules of built-in ops are imported when the first op is asked for: most surgery has none. A package adds its own
through the entry-point group `ckptsurgery.ops`: an entry point loads an `Op` subclass, or a module that registers some.
The group is looked at only for a name that is not known yet.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from .base import Op, OpError, _argument
from .listing import Listing

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["GROUP", "find_op", "make_op", "op", "op_names", "op_signature", "op_summary", "undone_by_name"]

GROUP = "ckptsurgery.ops"
_BUILT_IN = (
    "angles", "arithmetic", "blending", "consensus", "convolutions", "factoring", "folding_norms", "indexing",
    "low_rank", "merging", "over_axes", "positions", "row_sums", "rows", "quantised.floats", "quantised.fourbit",
    "quantised.gguf_blocks", "quantised.packed", "quantised.quantising",
)  # fmt: skip
_OPS: dict[str, type[Op]] = {}
_T = TypeVar("_T", bound=Op)


@dataclass_transform(frozen_default=True)
def op(cls: type[_T]) -> type[_T]:
    """Make an op known by its `name`; a class that is no dataclass yet becomes a frozen one.

    >>> from ckptsurgery.ops import Op, Specs, Tensors, make_op, op
    >>> @op
    ... class ScaleEach(Op):
    ...     "Multiply by a factor."
    ...     name = "scale_each"
    ...     factor: float
    ...     def infer(self, specs: Specs) -> Specs:
    ...         return specs
    ...     def run(self, tensors: Tensors) -> Tensors:
    ...         return tuple(t * self.factor for t in tensors)
    ...     def inverse(self, inputs=None):
    ...         return ScaleEach(1 / self.factor) if inputs is None else None
    >>> str(make_op("scale_each", (2,), {}).inverse())
    'scale_each(factor=0.5)'

    Raises:
        OpError: no name, or one that another op has. The same class may be defined again, as in a notebook's cell.
    """
    if not (isinstance(cls, type) and issubclass(cls, Op)):
        raise OpError(f"{cls!r} is no subclass of Op")
    if not isinstance(cls.name, str) or not cls.name.isidentifier():
        raise OpError(f'{cls.__name__}: an op needs a name that a rule can write, such as name = "scale_each"')
    if "__dataclass_fields__" not in cls.__dict__:
        cls = dataclass(frozen=True)(cls)
    facts = {"name", "joins", "axis_role", "elementwise", "reads_ahead", "undone_by"} & {f.name for f in fields(cls)}
    if facts:
        raise OpError(f"{cls.__name__}: {', '.join(sorted(facts))} must stand without annotation: it is no argument")
    if not cls.__module__.startswith(f"{__package__}."):
        _load_built_in()
    taken = _OPS.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise OpError(f"an op is called {cls.name!r} already: {taken.__module__}.{taken.__qualname__}")
    _OPS[cls.name] = cls
    return cls


def make_op(
    name: str,
    args: tuple[Any, ...] = (),
    keywords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Any] | None = None,
) -> Op:
    """The op of that name with these arguments, each checked against the type of its field.

    >>> make_op("cast", ("bf16",))
    Cast(dtype='BF16', floats=False, saturate=False)
    >>> make_op("add", ("v",), {}, dims={"v": 64}).value
    64

    Args:
        name: a built-in op, a registered one, or one that an entry point brings.
        args, keywords: plain data as `parse_call` gives it: lists as tuples, tables as tuples of pairs.
        dims: where a word or a formula is looked up that stands for a number, a list or a table; a field that takes
            text keeps the word.

    Raises:
        OpError: unknown op (with the closest names), or arguments that its signature does not take.
    """
    cls = _lookup(name)
    given = _bind(cls, args, keywords or {})
    hints = _hints(cls)
    known = dims if dims is not None else {}
    values = {key: _settle(cls, key, value, hints.get(key, Any), known) for key, value in given.items()}
    try:
        return cls(**values)
    except OpError as error:
        text = str(error) if str(error).startswith(name) else f"{name}: {error}"
        raise OpError(text, error.instead, error.lacks, error.code, error.help) from None
    except (TypeError, ValueError) as error:
        raise OpError(f"{name}: {error}; it is written {op_signature(name)}") from error


def undone_by_name(name: str, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of the op that undoes a call some of whose arguments are names; None where nothing does.

    >>> undone_by_name("take", ("x", "ids"), {})
    ('take', {'axis': 'x', 'ids': 'ids', 'back': True})
    """
    cls = _lookup(name)
    return cls.undone_as(_bind(cls, args, keywords))


def find_op(name: str) -> type[Op]:
    """The class of the op of that name.

    >>> find_op("add").elementwise
    True

    Raises:
        OpError: no op has this name; the closest names are in the text.
    """
    return _lookup(name)


def op_names() -> tuple[str, ...]:
    """All ops by name, those of installed packages included.

    >>> {"cast", "add", "same"} <= set(op_names())
    True
    """
    _load_entry_points(None)
    _load_built_in()
    return tuple(sorted(_OPS))


def op_summary(name: str) -> str:
    """The first line of an op's docstring.

    >>> op_summary("same")
    'Prove that tensors are equal, bit for bit, and pass one of them on.'
    """
    lines = (_lookup(name).__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""


def op_signature(name: str) -> str:
    """How an op is written, with its defaults.

    >>> op_signature("cast")
    'cast(dtype, floats=false, saturate=false)'
    """
    return _signature(_lookup(name))


def _signature(cls: type[Op]) -> str:
    parts = [f.name if f.default is MISSING else f"{f.name}={_argument(f.default)}" for f in fields(cls) if f.init]
    return f"{cls.name}({', '.join(parts)})" if parts else cls.name


def _lookup(name: str) -> type[Op]:
    if name not in _OPS:
        _load_built_in()
    if name in _OPS:
        return _OPS[name]
    failures = _load_entry_points(name)
    if name in _OPS:
        return _OPS[name]
    close = get_close_matches(name, _OPS, n=3)
    known = "" if close else f"; ops: {', '.join(sorted(_OPS))}"
    text = f"no op is called {name!r}{known}"
    raise OpError("; ".join([text, *failures]), {name: close} if close else None)


def _load_built_in() -> None:
    """Import the modules of built-in ops, which registers them."""
    for name in _BUILT_IN:
        import_module(f"{__package__}.{name}")


def _load_entry_points(name: str | None) -> list[str]:
    """Load what installed packages bring: the entry point of that name, or else all. Says what could not be loaded."""
    from importlib.metadata import entry_points

    found = tuple(entry_points(group=GROUP))
    failures: list[str] = []
    for point in [p for p in found if p.name == name] or found:
        failure = _load(point)
        if failure:
            failures.append(failure)
    return failures


def _load(point: EntryPoint) -> str | None:
    try:
        loaded = point.load()
        if isinstance(loaded, type):
            op(loaded)
    except Exception as error:  # a broken package must not hide which op was asked for
        return f"the entry point {point.name} = {point.value!r} failed: {error}"
    return None


def _bind(cls: type[Op], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    parameters = [f for f in fields(cls) if f.init]
    names = [f.name for f in parameters]
    written = f"it is written {_signature(cls)}"
    if len(args) > len(names):
        raise OpError(f"{cls.name} takes {len(names) or 'no'} arguments, not {len(args)}; {written}")
    given = dict(zip(names, args))
    for key, value in keywords.items():
        if key not in names:
            close = get_close_matches(key, names, n=1)
            raise OpError(f"{cls.name} has no argument {key!r}; {written}", {key: close} if close else None)
        if key in given:
            raise OpError(f"{cls.name} is given {key!r} twice; {written}")
        given[key] = value
    missing = [f.name for f in parameters if f.name not in given and f.default is f.default_factory is MISSING]
    if missing:
        raise OpError(f"{cls.name} needs {' and '.join(missing)}; {written}")
    return given


def _hints(cls: type[Op]) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except (NameError, TypeError):
        # A class defined inside a function may name types that only that function sees; its own __init__ must check.
        return {}


def _settle(cls: type[Op], key: str, value: Any, hint: Any, dims: Mapping[str, Any]) -> Any:
    try:
        return _coerce(value, hint, dims)
    except _Mismatch:
        # A word is taken for a name of `dims` only where a number could stand.
        word = isinstance(value, str) and value.isidentifier() and ("int" in str(hint) or "float" in str(hint))
        known = dims.get(value) if word else None
        help = f", and dims do not name {str(value)!r}" if word else ""
        help = help if known is None else f", and dims say {value} = {known}"
        text = f"{cls.name}: {key} wants {_wanted(hint)}, not {_argument(value)}{help}"
        raise OpError(f"{text}; it is written {_signature(cls)}") from None


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(_argument(choice) for choice in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


class _Mismatch(Exception):
    pass


def _coerce(value: Any, hint: Any, dims: Mapping[str, Any]) -> Any:
    """`value` as the type `hint` wants it; a word where no text is wanted is looked up in `dims`."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(value, inner, dims)
    if origin is Literal:
        if value in inner:
            return value
    elif origin is tuple and isinstance(value, Listing) and inner[1:] == (Ellipsis,) and inner[0] in (int, float):
        if inner[0] is float or value.whole or not value:
            return value
    elif origin is tuple and isinstance(value, (tuple, list)):
        return _coerce_tuple(tuple(value), inner, dims)
    elif hint is str and isinstance(value, str):
        return str(value)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is type(None):
        if value is None:
            return None
    elif (isinstance(hint, type) and type(value) is hint) or (not isinstance(hint, type) and origin is not tuple):
        return value
    found = dims.get(value) if isinstance(value, str) else None
    if found is None or isinstance(found, str):
        raise _Mismatch
    return _coerce(tuple(found.items()) if isinstance(found, Mapping) else found, hint, {})


def _coerce_union(value: Any, hints: tuple[Any, ...], dims: Mapping[str, Any]) -> Any:
    exact = [h for h in hints if h is type(value)]
    for lookup in ({}, dims):
        for hint in (*exact, *hints):
            try:
                return _coerce(value, hint, lookup)
            except _Mismatch:
                continue
    raise _Mismatch


def _coerce_tuple(values: tuple[Any, ...], hints: tuple[Any, ...], dims: Mapping[str, Any]) -> tuple[Any, ...]:
    if len(hints) == 2 and hints[1] is Ellipsis:
        return tuple(_coerce(v, hints[0], dims) for v in values)
    if len(values) != len(hints):
        raise _Mismatch
    return tuple(_coerce(v, h, dims) for v, h in zip(values, hints))
