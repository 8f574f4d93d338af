"""The tensors of an ONNX model: those of its graph, of graphs within nodes, of functions, and constants of nodes.

No graph is built. A node is looked at for tensors in its attributes, since writers may keep weights there. Source:
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (`ModelProto`, `GraphProto`, `NodeProto`, `TensorProto`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .cursor import Damaged, HeaderCursor
from .format import OpenedSource
from .protobuf import LENGTH, VARINT, MessageField, fields_of, text_of, varint

__all__ = ["DOUBLES", "FLOATS", "RAW", "TensorProto", "tensors_of"]

_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_GRAPH_NODE, _GRAPH_INITIALISER, _GRAPH_SPARSE = 1, 5, 15
_FUNCTION_NAME, _FUNCTION_NODE = 1, 7
_NODE_OUTPUT, _NODE_OPERATION, _NODE_ATTRIBUTE, _NODE_DOMAIN = 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_FLOATS, _ATTRIBUTE_SPARSE = 1, (6, 11), 7, (22, 23)
_ATTRIBUTE_TENSORS = (5, 10)
_DIMS, _TYPE, FLOATS, _INTS, _LONGS, _NAME, RAW, DOUBLES, _UNSIGNED = 1, 2, 4, 5, 7, 8, 9, 10, 11
_EXTERNAL, _LOCATION = 13, 14
_LEAST = 16  # bytes of an attribute with more than one number in it
_DEPTH = 32  # of graphs within nodes
_F32 = 1
_LONGEST = 1 << 16  # bytes of an entry of external data
_OF_ATTRIBUTES = frozenset((_ATTRIBUTE_NAME, *_ATTRIBUTE_GRAPHS, *_ATTRIBUTE_TENSORS, *_ATTRIBUTE_SPARSE))


@dataclass(slots=True)
class TensorProto:
    """A `TensorProto`, without its data: each part of these is a field's number, where it begins, its length.

    Args:
        in_node: whether it is a constant, an attribute of a node.
        lost: why it cannot be read; empty for most.
    """

    dims: list[int] = field(default_factory=list)
    type: int = 0
    name: str = ""
    data: list[MessageField] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)
    is_external: bool = False
    in_node: bool = False
    lost: str = ""


def tensors_of(opened: OpenedSource) -> Iterator[TensorProto]:
    """Yield all tensors of a model, each under a name of its own.

    An initialiser has its own name, and a constant that of its node's output. Before names in a graph within a node
    are the node's output and the attribute, before those in a function is the function.

    Raises:
        Damaged: a message makes no sense.
    """
    cursor = HeaderCursor(opened)
    for part in fields_of(cursor, 0, opened.size):
        if part.wire == LENGTH and part.number == _MODEL_GRAPH:
            yield from _graph(cursor, part, "", 0)
        elif part.wire == LENGTH and part.number == _MODEL_FUNCTION:
            inside = list(_fields(cursor, part))
            name = next((text_of(cursor, inner) for inner in inside if inner.number == _FUNCTION_NAME), "")
            for inner in inside:
                if inner.number == _FUNCTION_NODE:
                    yield from _node(cursor, inner, f"{name}/", 1)


def _fields(cursor: HeaderCursor, part: MessageField) -> Iterator[MessageField]:
    """The fields of a message within a message that are neither numbers nor of a fixed size."""
    inside = fields_of(cursor, part.value, part.value + part.nbytes)
    return (inner for inner in inside if inner.wire == LENGTH)


def _graph(cursor: HeaderCursor, graph: MessageField, before: str, depth: int) -> Iterator[TensorProto]:
    if depth > _DEPTH:
        raise Damaged("its graphs nest too deep")
    sparse = 0
    for part in _fields(cursor, graph):
        if part.number == _GRAPH_INITIALISER:
            tensor = _tensor(cursor, part)
            tensor.name = before + tensor.name if tensor.name else ""
            yield tensor
        elif part.number == _GRAPH_SPARSE:
            yield TensorProto(name=f"{before}sparse_initializer.{sparse}", lost="a sparse tensor")
            sparse += 1
        elif part.number == _GRAPH_NODE and part.nbytes > _LEAST:
            yield from _node(cursor, part, before, depth)


def _node(cursor: HeaderCursor, node: MessageField, before: str, depth: int) -> Iterator[TensorProto]:
    attributes, texts = list[MessageField](), dict[int, str]()
    for part in _fields(cursor, node):
        if part.number == _NODE_ATTRIBUTE and part.nbytes > _LEAST:
            attributes.append(part)
        elif part.number in (_NODE_OUTPUT, _NODE_OPERATION, _NODE_DOMAIN) and part.number not in texts:
            texts[part.number] = text_of(cursor, part)
    name, operation = before + texts.get(_NODE_OUTPUT, ""), texts.get(_NODE_OPERATION, "")
    is_constant, of_ml = operation == "Constant", texts.get(_NODE_DOMAIN, "") == "ai.onnx.ml"
    for attribute in attributes:
        inside = list(_parts_of_attribute(cursor, attribute))
        called = next((text_of(cursor, part) for part in inside if part.number == _ATTRIBUTE_NAME), "")
        place = name if is_constant else f"{name}/{called}"
        numbers = [part for part in inside if part.number == _ATTRIBUTE_FLOATS]
        if numbers and is_constant:
            data = [part._replace(number=FLOATS) for part in numbers]
            dims = [sum(part.nbytes for part in data) // 4]
            yield TensorProto(dims, _F32, place, data, in_node=True)
        elif numbers and of_ml:
            yield TensorProto(name=place, lost=f"numbers of a node {operation}")
        yield from _of_attribute(cursor, inside, place, depth)


def _of_attribute(cursor: HeaderCursor, inside: list[MessageField], place: str, depth: int) -> Iterator[TensorProto]:
    """The tensors and graphs in an attribute of a node."""
    count = sum(part.number in (*_ATTRIBUTE_TENSORS, *_ATTRIBUTE_GRAPHS) for part in inside)
    found = 0
    for part in inside:
        own = f"{place}/{found}" if count > 1 else place
        if part.number in _ATTRIBUTE_TENSORS:
            tensor = _tensor(cursor, part)
            tensor.name, tensor.in_node = own, True
            yield tensor
        elif part.number in _ATTRIBUTE_GRAPHS:
            yield from _graph(cursor, part, f"{own}/", depth + 1)
        elif part.number in _ATTRIBUTE_SPARSE:
            yield TensorProto(name=place, lost="a sparse tensor")
            continue
        else:
            continue
        found += 1


def _parts_of_attribute(cursor: HeaderCursor, attribute: MessageField) -> Iterator[MessageField]:
    """The fields of an attribute that may lead to tensors, and its floats, packed or one by one."""
    for part in fields_of(cursor, attribute.value, attribute.value + attribute.nbytes):
        is_text = part.wire == LENGTH
        is_floats = part.number == _ATTRIBUTE_FLOATS and (is_text or part.nbytes == 4)
        if is_floats or (is_text and part.number in _OF_ATTRIBUTES):
            yield part


def _tensor(cursor: HeaderCursor, message: MessageField) -> TensorProto:
    found = TensorProto()
    for part in fields_of(cursor, message.value, message.value + message.nbytes):
        if part.number == _DIMS:
            found.dims += _numbers(cursor, part)
            if len(found.dims) > 1024:
                raise Damaged("a tensor has more than 1,024 dimensions")
        elif part.number == _TYPE:
            found.type = part.value
        elif part.number == _NAME and part.wire == LENGTH:
            found.name = text_of(cursor, part)
        elif part.number == _LOCATION:
            found.is_external = part.value == 1
        elif part.number == _EXTERNAL and part.wire == LENGTH:
            if part.nbytes > _LONGEST:
                raise Damaged(f"an entry of external data has {part.nbytes:,} bytes")
            texts = {inner.number: text_of(cursor, inner) for inner in _fields(cursor, part)}
            found.external[texts.get(1, "")] = texts.get(2, "")
        elif part.number in (FLOATS, _INTS, _LONGS, RAW, DOUBLES, _UNSIGNED):
            if part.wire == VARINT:  # numbers one by one: where each begins is not known, so the message is kept
                part = MessageField(part.number, VARINT, part.value, 0)
            found.data.append(part)
    return found


def _numbers(cursor: HeaderCursor, part: MessageField) -> list[int]:
    """A repeated number, packed or not, as signed integers."""
    if part.wire == VARINT:
        return [_signed(part.value)]
    if part.wire != LENGTH or part.nbytes > 1 << 14:
        raise Damaged("the dimensions of a tensor make no sense")
    cursor.at = part.value
    found = []
    while cursor.at < part.value + part.nbytes:
        found.append(_signed(varint(cursor)))
    return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
