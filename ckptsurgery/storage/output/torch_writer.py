"""`TorchZipWriter`: the zip file that `torch.save` would write, laid out beforehand and filled in any order."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

from ...errors import CheckpointError, Diagnostic
from ...narrowing import present
from ...specs import DTYPES, TensorSpec
from ..contents import Entry, Extent
from ..formats.format import Announced
from ..formats.torch_pickle import OMITTED, Pickle, StoredTensor, writable
from ..formats.torch_zip import METADATA_RECORD
from ..formats.zip_records import ALIGNMENT, Records
from ..unpickling.frames import framed, paths_beside
from ..unpickling.inert import Ordered
from ..unpickling.nodes import is_state
from .staging import Output, beside
from .zip_writer import ZipWriter

__all__ = ["TorchZipWriter"]

_CHUNK = 1 << 20


class TorchZipWriter(ZipWriter):
    """Writes a torch zip file; the tensors' bytes may come in any order and from any thread.

    The state_dict lies in the file where `frame` leads, with the extras around it under their own names; extras that
    the frame does not name lie in the state_dict. Without a frame the file holds the state_dict itself, or
    `{"state_dict": …, **extras}`. `_metadata` is set on the state_dict as `Module.state_dict` does. Tensors among the
    extras are copied along; what cannot go along (objects of classes, an extra that a tensor is called like) is listed
    in `left_out`.

    Both names of an alias share one storage in the file; metadata has a record of its own, which torch passes over.

    Args:
        announced: what the file will hold.

    Raises:
        CheckpointError: a dtype that torch has not; an alias of nothing; and what `Writer` raises.
    """

    def __init__(self, announced: Announced) -> None:
        final, specs = announced.path, announced.specs
        _check(specs, announced.aliases, str(final))
        self.left_out: list[str] = []
        self._numbers: dict[object, StoredTensor] = {}
        self._kept: list[tuple[int, Any]] = []  # storage number, and the tensor among the extras that fills it
        self._sizes_of = [spec.nbytes for spec in specs.values()]
        pickled = Pickle().dumps(self._tree(announced))
        temporary = beside(final)
        records, first, head = self._lay_out(pickled, announced.metadata)
        places = dict(zip(specs, map(Extent, repeat(str(temporary)), records.starts[first:], self._sizes_of)))
        output = Output(final, temporary, records.end + records.directory_size, head)
        super().__init__(output, places, records, first, self._sizes_of, durability=announced.durability)
        self.left_out.sort()

    def _tree(self, announced: Announced) -> Any:
        extras, frame = announced.extras, announced.frame
        model = Ordered()
        for i, (key, spec) in enumerate(announced.specs.items()):
            model[key] = StoredTensor(str(i), spec, None, spec.nbytes)
        for alias, kept in announced.aliases.items():
            model[alias] = model[kept]
        beside: dict[str, Any] = {}
        apart = set(extras) if frame is None else paths_beside(frame)
        # Short paths first, so that one which goes on where another ends finds it, and is kept beside it.
        for path, value in (
            sorted(extras.items(), key=lambda pair: pair[0].count(".")) if frame is None else extras.items()
        ):
            kept_value = writable(value, path, self._store, self.left_out)
            if kept_value is OMITTED:
                continue
            if path == "_metadata":
                model.attributes["_metadata"] = kept_value
            elif path not in apart or is_state(path):
                if path in model:
                    self.left_out.append(path)
                else:
                    model[path] = kept_value
            elif frame is not None:
                beside[path] = kept_value
            elif path == "state_dict" or path.startswith("state_dict."):
                self.left_out.append(path)
            else:
                _nest(beside, path, kept_value)
        if frame is not None:
            return framed(frame, model, beside)
        return {"state_dict": model, **beside} if beside else model

    def _store(self, value: Any) -> StoredTensor | None:
        """The record that a tensor among the extras gets; None for what is no tensor."""
        if isinstance(value, Entry) and value.tensor is not None and not callable(value.tensor):
            value = value.tensor
        if isinstance(value, Entry):
            spec, strides = value.spec, value.strides
            if DTYPES[spec.dtype].torch is None:
                return None
            nbytes = spec.nbytes if strides is None else _span(spec, strides)
        elif type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "untyped_storage"):
            from ..tensors import dense_bytes, spec_of

            try:
                spec, strides = spec_of(value), None
                dense_bytes(value, "")
            except (CheckpointError, RuntimeError, NotImplementedError):
                return None
            nbytes = spec.nbytes
        else:
            return None
        # one tensor twice, such as an optimizer's view of tied weights, is stored once
        place: object = id(value)
        if isinstance(value, Entry):
            place = (value.file, value.offset, spec, strides, value.big_endian, id(value.tensor))
        known = self._numbers.get(place)
        if known is None:
            number = len(self._sizes_of)
            self._sizes_of.append(nbytes)
            self._kept.append((number, value))
            known = self._numbers[place] = StoredTensor(str(number), spec, strides, nbytes)
        return known

    def _lay_out(self, pickled: bytes, metadata: Mapping[str, str]) -> tuple[Records, int, bytearray]:
        """Place every record; return them, the number of the first storage, and the beginning of the file."""
        noted = {key: value for key, value in metadata.items() if (key, value) != ("format", "pt")}
        first = {"data.pkl": pickled, ".format_version": b"1", ".storage_alignment": str(ALIGNMENT).encode()}
        first["byteorder"] = b"little"
        last = {"version": b"3\n"}
        if noted:
            import json

            last[METADATA_RECORD] = json.dumps(noted, ensure_ascii=False).encode()
        records = Records()
        _add(records, first)
        head = bytearray()
        for number, data in enumerate(first.values()):
            head += records.seam(number) + data
        head += records.descriptor(len(first) - 1)
        self._tail = list(last.values())
        records.add(map("archive/data/{}".format, range(len(self._sizes_of))), self._sizes_of)
        _add(records, last)
        records.add(["archive/.data/serialization_id"], [40])
        return records, len(first), head

    def _complete(self) -> None:
        """Copies the extras' tensors, then writes what stands between the records, and the directory."""
        for number, value in self._kept:
            at = self._starts[number]
            for chunk in _chunks(value):
                # not `self.write`: these bytes are not among those that the caller owes
                self._pwrite(self._temporary, at, memoryview(chunk))
                at += len(chunk)
        self._settle()
        records = self._records
        for number, data in enumerate(self._tail, self._first + len(self._sums)):
            self._seam(number, data)
        identity = len(records.names) - 1
        data = self._identity()
        records.crcs[identity] = zlib.crc32(data)
        self._seam(identity, data + records.descriptor(identity) + records.directory())

    def _identity(self) -> bytes:
        records = self._records
        rows = list(zip(records.names, records.crcs, records.sizes))[:-1]
        told = "".join([f"{name.decode()} {crc} {nbytes}\n" for name, crc, nbytes in rows])
        return str(int(hashlib.sha256(told.encode()).hexdigest(), 16) % 10**40).zfill(40).encode()


def _add(records: Records, known: Mapping[str, bytes]) -> None:
    """Place records whose data are known."""
    data = known.values()
    records.add([f"archive/{name}" for name in known], list(map(len, data)), map(zlib.crc32, data))


def _check(specs: Mapping[str, TensorSpec], aliases: Mapping[str, str], place: str) -> None:
    problems = []
    for key, spec in specs.items():
        if DTYPES[spec.dtype].torch is None:
            text = f"torch has no dtype for {key!r} ({spec})"
            problems.append(Diagnostic("dtype-not-in-torch", text, place, help="write a .safetensors file"))
        elif DTYPES[spec.dtype].bits < 8 and (not spec.shape or spec.shape[-1] % 2):
            text = f"torch packs {spec.dtype} in pairs, and the last axis of {key!r} is odd: {spec}"
            problems.append(Diagnostic("odd-packed-shape", text, place, help="write a .safetensors file"))
    for alias, kept in aliases.items():
        if kept not in specs or alias in specs:
            why = "a tensor that is written under its own name" if alias in specs else "tied to nothing that is written"
            problems.append(Diagnostic("alias-of-nothing", f"{alias!r} -> {kept!r} is {why}", place))
    if problems:
        raise CheckpointError(problems)


def _nest(tree: dict[str, Any], path: str, value: Any) -> None:
    *above, name = path.split(".")
    node = tree
    for part in above:
        inner = node.setdefault(part, {})
        if not isinstance(inner, dict):
            tree[path] = value
            return
        node = inner
    if name in node:
        tree[path] = value
    else:
        node[name] = value


def _span(spec: TensorSpec, strides: tuple[int, ...]) -> int:
    from ..tensors import span

    return span(spec.shape, strides) * DTYPES[spec.dtype].itemsize


def _chunks(value: Any) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor among the extras, a piece at a time."""
    if not isinstance(value, Entry) or callable(value.tensor):
        from ..tensors import dense_bytes

        yield dense_bytes(value.tensor() if isinstance(value, Entry) else value, "")
        return
    left = value.spec.nbytes if value.strides is None else _span(value.spec, value.strides)
    with open(present(value.file, "the file of a tensor beside the model"), "rb") as file:  # noqa: PTH123 - a path from Entry.file, opened as it is
        file.seek(value.offset)
        while left:
            data = file.read(min(left, _CHUNK))
            if not data:
                why = f"{value.file!r} became shorter while it was read"
                raise CheckpointError(Diagnostic("truncated-file", why, value.file))
            left -= len(data)
            if value.big_endian:
                from ..tensors import swap_bytes

                data = bytes(swap_bytes(bytearray(data), value.spec.dtype))
            yield data
