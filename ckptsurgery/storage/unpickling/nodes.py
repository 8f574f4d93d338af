"""The nodes of a checkpoint's tree: what is a tensor, what has parts, and what the rest becomes as extras."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice
from typing import Any

from ...errors import CheckpointError
from .inert import Array, Blob, Fields, FileBytes, Joined, Opaque, Ordered, Tensor

__all__ = [
    "DEPTH",
    "MODEL_NAMES",
    "children",
    "holds_tensors",
    "is_lost",
    "is_state",
    "is_tensor",
    "lost",
    "name_of",
    "settle",
    "without_settings",
]

MODEL_NAMES = frozenset(
    {"model", "models", "module", "net", "network", "params", "parameters", "state_dict", "model_state_dict",
     "model_state", "weights", "variables", "target"}
)  # fmt: skip
"""Names that training code gives to the mapping that is the model."""
_SETTINGS = re.compile(
    r"(?:\w*_)?(?:config(?:s|uration)?|cfg|conf|args|arguments|[hp]params|hyper_?param\w*|options|settings|stats|statistics)",
    re.IGNORECASE,
)
DEPTH = 64  # mappings within mappings; real checkpoints have a dozen
_LONGEST = 1 << 26  # bytes; a longer byte string among the extras is not read


def name_of(key: Any) -> str:
    """The text by which a mapping's key goes; what is no text, and may be as large as the file, is shortened.

    >>> name_of("w"), name_of(3), name_of(("a", 1)), name_of(tuple(range(9)))
    ('w', '3', "('a', 1)", '(0, 1, 2, 3, 4, 5, 6, 7, …)')
    """
    return key if type(key) is str else _spelt(key, 2)


def _spelt(key: Any, depth: int) -> str:
    kind = type(key)
    if kind is str:
        return repr(key[:_SHOWN])
    if kind is int:
        return str(key) if -_LARGE_INT < key < _LARGE_INT else f"an integer of {key.bit_length()} bits"
    if kind in (tuple, frozenset) and depth:
        shown = [_spelt(part, depth - 1) for part in list(key)[:_PARTS]]
        shown += ["…"] * (len(key) > _PARTS)
        return f"({', '.join(shown)}{',' * (len(key) == 1)})" if kind is tuple else f"{{{', '.join(sorted(shown))}}}"
    if isinstance(key, (tuple, frozenset, list, dict, set)):
        return f"a {kind.__name__} of {len(key)}"
    return repr(key)[:_SHOWN]


_LARGE_INT = 1 << 256
_PARTS, _SHOWN = 8, 200  # parts of a key, characters of a part


def settle(extras: dict[str, Any], place: Callable[[Any], Any]) -> dict[str, Any]:
    """`extras` with every tensor replaced by what `place` makes of it, or by an opaque note where that fails.

    Dictionaries and lists are changed in place: a second tree of them would be as large again.
    """
    settler = _Settler(place)
    return {path: settler.settled(value, 0) for path, value in extras.items()}


class _Settler:
    """Goes through a tree once; shared parts stay shared, since a graph of lists may have exponentially many paths."""

    def __init__(self, place: Callable[[Any], Any]) -> None:
        self.place = place
        # What each was beside what became of it: as long as it is kept, no other object has its id.
        self.known: dict[int, tuple[Any, Any]] = {}

    def settled(self, value: Any, depth: int) -> Any:
        if value is None or type(value) in _PLAIN:
            return value
        if type(value) is Opaque:
            if not value.pairs:
                return value
            value = value.pairs  # an object of a class derived from dict
        known = self.known.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, (dict, list, tuple)):
            if not value and type(value) is not Ordered:
                return value if type(value) is not Fields else {}
            name = type(value).__name__
            if depth >= DEPTH:
                return Opaque("builtins", name, (), "nested too deep")
            if len(value) <= _FEW and all(part is None or type(part) in _PLAIN for part in _inside(value)):
                return value
            self.known[id(value)] = value, Opaque("builtins", name, (), "it contains itself")
            made = self._parts(value, depth + 1)
        else:
            made = self._leaf(value)
        self.known[id(value)] = value, made
        return made

    def _leaf(self, value: Any) -> Any:
        if is_tensor(value):
            try:
                return self.place(value)
            except CheckpointError as error:
                return Opaque("torch", "Tensor", (), error.diagnostics[0].headline)
        return _plain(value)

    def _parts(self, value: Any, depth: int) -> Any:
        if isinstance(value, tuple):
            items = [self.settled(part, depth) for part in value]
            return value if all(a is b for a, b in zip(items, value)) else tuple(items)
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            made = self.settled(part, depth)
            if made is not part:
                value[key] = made
        if type(value) is Ordered and value.attributes:
            attributes = self.settled(value.attributes, depth)
            value.attributes = attributes if isinstance(attributes, dict) else {}
        return dict(value) if type(value) is Fields else value


_FEW = 8  # parts of a list that is looked at again, rather than noted
_PLAIN = frozenset({str, int, float, bool, bytes, complex})


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    if isinstance(value, FileBytes):
        return bytes(value)
    if type(value) is Blob and value.nbytes <= _LONGEST:
        return value.read()
    if type(value) is Array:
        return Opaque("numpy", "ndarray", (), f"{value.type.code if value.type else '?'} {list(value.shape)}")
    return value


def is_tensor(value: Any) -> bool:
    """Whether `value` was saved as a tensor or a numpy array of numbers; those that cannot be read count as well."""
    kind = type(value)
    return kind is Tensor or kind is Joined or (kind is Array and value.dtype is not None) or is_lost(value)


def is_state(key: str) -> bool:
    """Return whether a key names the extra state of a module (`get_extra_state`)."""
    return key == "_extra_state" or key.endswith("._extra_state")


def is_lost(value: Any) -> bool:
    """Whether `value` was saved as a tensor or an array of numbers, and cannot be read."""
    kind = type(value)
    if kind is Opaque:
        return value.note is not None and value.module.partition(".")[0] == "torch"
    return kind is Array and value.dtype is None and value.type is not None and value.type.code[:1] in _NUMBERS


_NUMBERS = ("f", "i", "u", "c")  # such as f16, an extended precision that no format holds


def lost(note: str) -> Opaque:
    """A record of a tensor that cannot be read."""
    return Opaque("torch", "Tensor", (), note)


def holds_tensors(value: Any, depth: int = 6) -> bool:
    """Whether a record of an object of the file has tensors or arrays of floats among its parts."""
    if type(value) is Tensor or type(value) is Joined:
        return True
    if depth <= 0:
        return False
    if type(value) is Array:
        if type(value.data) is list:
            return holds_tensors(value.data, depth - 1)
        return bool(value.shape) and value.type is not None and value.type.code[:1] in _FLOATS
    if type(value) is Opaque:
        return any(holds_tensors(part, depth - 1) for part in (value.args, value.state, value.pairs, value.items))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(holds_tensors(part, depth - 1) for part in islice(parts, _LOOKED_AT))


_FLOATS = ("f", "c", "b")  # bfloat16; the integers of a random state are no weights
_LOOKED_AT = 100  # parts of one node


def children(node: Any) -> Iterator[tuple[Any, Any]] | None:
    """The keyed parts of a mapping, list or pickled module; None for a leaf."""
    if isinstance(node, dict):
        return iter(node.items())
    if type(node) in (list, tuple):
        return enumerate(node)
    if type(node) is Opaque:
        return _module_parts(node)
    return None


def _module_parts(node: Opaque) -> Iterator[tuple[Any, Any]] | None:
    state = node.state[0] if type(node.state) is tuple and node.state else node.state
    if isinstance(state, dict):
        if isinstance(state.get("_modules"), dict) and isinstance(state.get("_parameters"), dict):
            hidden = state.get("_non_persistent_buffers_set") or ()
            buffers = state.get("_buffers")
            buffers = buffers if isinstance(buffers, dict) else {}
            return iter(
                [(k, v) for k, v in state["_parameters"].items() if v is not None]
                + [(k, v) for k, v in buffers.items() if v is not None and k not in hidden]
                + [(k, v) for k, v in state["_modules"].items() if v is not None]
            )
        if node.module.startswith("__torch__"):
            return ((k, v) for k, v in state.items() if is_tensor(v) or children(v) is not None)
    return iter(node.pairs.items()) if node.pairs else None


Candidate = tuple[tuple[str, ...], Any]  # the path of a node, and the node


def without_settings(candidates: list[Candidate]) -> list[Candidate]:
    """The state_dicts by path without those that are settings or statistics beside another one.

    Settings go by the name of a mapping above which nothing is called after a model. Statistics are mappings of vectors
    under plain names, none of them a weight or a bias, beside the one state_dict that is called after a model.
    """
    names = set(chain.from_iterable(path for path, _ in candidates))
    settings = {name for name in names if _SETTINGS.fullmatch(name)}  # once a name: a tree may have a million paths
    others = [(path, node) for path, node in candidates if not _is_in_settings(path, settings)] or candidates
    models = [path for path, _ in others if path and path[-1] in MODEL_NAMES]
    if len(models) != 1:
        return others
    return [(path, node) for path, node in others if path == models[0] or not _is_statistics(node)]


def _is_in_settings(path: tuple[str, ...], settings: Collection[str]) -> bool:
    for name in path:
        if name in MODEL_NAMES:
            return False
        if name in settings:
            return True
    return False


def _is_statistics(node: Any) -> bool:
    parts = list(children(node) or ())
    plain = all(type(key) is str and "." not in key and key not in ("weight", "bias") for key, _ in parts)
    return (
        plain
        and all(len(leaf.shape) <= 1 for _, leaf in parts if is_tensor(leaf))
        and not any(children(value) for _, value in parts if not is_tensor(value))
    )
