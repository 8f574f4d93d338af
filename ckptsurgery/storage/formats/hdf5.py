"""HDF5 files, as h5py and Keras write them: each dataset of numbers is a tensor under its path.

Contiguous datasets are read where they are stored. Chunks are unpacked and put together when they are loaded. HDF5's
own library is not used: it is written for trusted files, and follows their links into other files.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ...specs import DTYPES, TensorSpec, shape_problem
from ...wording import is_text
from ..contents import Contents, Entry
from ..json_text import parse_json
from ..sources.byte_source import ByteSource, read_run
from ..unpickling.inert import Opaque
from ..unpickling.nodes import lost
from .built import built
from .cursor import Damaged, reading
from .format import Format, OpenedSource
from .hdf5_datasets import Chunks, Dataset, ElementType, attribute_of, dataset_of
from .hdf5_links import links_of
from .hdf5_objects import Hdf5File, is_hdf5
from .zip_archive import refused

__all__ = ["Hdf5Format"]

_OBJECTS = 1_000_000
_DEPTH = 64
_DEFLATE, _SHUFFLE, _CHECKSUM = 1, 2, 3
_REMEDY = (
    "the file is damaged: copy or download it again; if h5py reads it: import h5py, pickle; found = {{}}; "
    "h5py.File({path!r}).visititems(lambda name, item: found.__setitem__(name, item[()]) if getattr(item, 'dtype', "
    "None) is not None and item.dtype.kind in 'fiub' else None); pickle.dump(found, open('new.pkl', 'wb'))"
)


class Hdf5Format(Format):
    """A file of HDF5, such as Keras' `.h5` and `.weights.h5`."""

    name = "hdf5"
    text = "an HDF5 file (Keras, h5py)"
    suffixes = (".h5", ".hdf5")

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether the signature is at the start, or behind a block of the user's."""
        return is_hdf5(head)

    def read(self, opened: OpenedSource) -> Contents:
        """Return the datasets of numbers by path; what else there is goes to the extras.

        Raises:
            CheckpointError: damaged, or no dataset of numbers can be read.
        """
        contents = Contents({})
        with reading(opened.name, _REMEDY.format(path=opened.name)):
            file = Hdf5File.of(opened)
            for path, dataset in _walk(file, contents.extras):
                _place(path, dataset, file, contents)
            contents.config = _config(file)
        if file.end and not file.base:
            opened.refuse_behind(file.end)
        if not contents.entries:
            unread = [path for path, value in contents.extras.items() if type(value) is Opaque]
            why = f"holds no dataset of numbers that is read here; it holds {', '.join(unread[:3]) or 'nothing'}"
            raise refused(opened.name, "no-tensors", why, _REMEDY.format(path=opened.name))
        return contents


def _walk(file: Hdf5File, extras: dict[str, Any]) -> Iterator[tuple[str, Dataset]]:
    """The datasets of a file by path, group by group; a group that has two names counts once."""
    seen, count = {file.root}, 0
    waiting = [("", file.root, 0)]
    while waiting:
        path, address, depth = waiting.pop()
        messages = file.messages(address)
        links = links_of(file, messages)
        if links is None:
            dataset = dataset_of(file, messages)
            if dataset is not None:
                yield path, dataset
            continue
        inner = []
        for link in links:
            name = f"{path}/{link.name}" if path else link.name
            count += 1
            if not link.name or not is_text(link.name) or count > _OBJECTS or depth > _DEPTH or len(name) > 1 << 14:
                raise Damaged("it holds too many objects, or nests them too deep")
            if link.address is None:
                extras[name] = Opaque("h5py", "ExternalLink", (), "a link into another file, which is not followed")
            elif link.address not in seen:
                inner.append((name, link.address, depth + 1))
                seen.add(link.address)
        waiting += reversed(inner)


def _place(path: str, dataset: Dataset, file: Hdf5File, contents: Contents) -> None:
    """Put a dataset among the entries, or among the extras if it cannot be a tensor."""
    kind, opened = dataset.type, file.opened
    if path in contents.entries or path in contents.extras:
        raise Damaged(f"it holds {path!r} twice")
    if not kind.is_number or dataset.shape is None:
        contents.extras[path] = Opaque("h5py", "Dataset", (), f"{kind.text}, {list(dataset.shape or ())}")
        return
    why = dataset.why_not or ("" if kind.dtype else f"{kind.text} of {kind.nbytes} bytes that no dtype here is")
    if why or kind.dtype is None:
        contents.extras[path] = lost(why)
        return
    absurd = shape_problem(dataset.shape, DTYPES[kind.dtype].bits)
    if absurd:
        raise Damaged(f"{path!r} {absurd}")
    spec = TensorSpec(dataset.shape, kind.dtype)
    if dataset.run is not None:
        start, nbytes = dataset.run
        if nbytes < spec.nbytes or start + spec.nbytes > opened.size:
            raise Damaged(f"{path!r} is {spec} of {spec.nbytes:,} bytes, and {nbytes:,} are there")
        contents.entries[path] = Entry(spec, opened.name, start, None, kind.big_endian and kind.nbytes > 1)
    elif dataset.chunks is not None:
        make = partial(_unchunked, spec=spec, chunks=dataset.chunks, kind=kind, widths=(file.offsets, file.lengths),
                       base=file.base)  # fmt: skip
        contents.entries[path] = built(spec, path, opened.source, make)


def _config(file: Hdf5File) -> dict[str, Any] | None:
    """The model's configuration, which Keras keeps as an attribute."""
    text = attribute_of(file, file.messages(file.root), "model_config")
    try:
        found = parse_json(text.encode()) if text else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _unchunked(
    source: ByteSource, spec: TensorSpec, chunks: Chunks, kind: ElementType, widths: tuple[int, int], base: int
) -> bytearray:
    """The elements of a dataset in chunks."""
    import numpy

    made = bytearray(spec.nbytes)
    whole = numpy.frombuffer(made, f"V{kind.nbytes}").reshape(spec.shape)
    full = kind.nbytes
    for n in chunks.shape:
        full *= n
    if full > max(1 << 26, 1100 * source.size):
        raise ValueError(f"a chunk of {full:,} bytes")
    seen = set[tuple[int, ...]]()
    with OpenedSource(source) as opened:
        file = Hdf5File(opened, base, 0, *widths)
        for starts, address, nbytes, mask in _chunks_of(file, chunks, len(spec.shape)):
            if tuple(starts) in seen:
                raise ValueError("a chunk is listed twice")
            seen.add(tuple(starts))
            if any(start >= n or start % step for start, n, step in zip(starts, spec.shape, chunks.shape)):
                continue  # left over from before the dataset was made smaller
            data = _unfiltered(read_run(source, base + address, nbytes), chunks.filters, mask, kind.nbytes, full)
            block = numpy.frombuffer(data, f"V{kind.nbytes}", count=full // kind.nbytes).reshape(chunks.shape)
            ends = [min(start + step, n) for start, step, n in zip(starts, chunks.shape, spec.shape)]
            inside = tuple(slice(0, end - start) for start, end in zip(starts, ends))
            whole[tuple(slice(*pair) for pair in zip(starts, ends))] = block[inside]
    if kind.big_endian:
        from ..tensors import swap_bytes

        return swap_bytes(made, spec.dtype)
    return made


def _chunks_of(file: Hdf5File, chunks: Chunks, rank: int) -> Iterator[tuple[list[int], int, int, int]]:
    """Each chunk's first indices, address, bytes in the file, and the filters that it was spared."""
    if chunks.tree is None:
        address, nbytes = chunks.single
        if address != file.nowhere:
            yield [0] * rank, address, nbytes, chunks.mask
        return
    waiting, seen = [] if chunks.tree == file.nowhere else [chunks.tree], set[int]()
    while waiting:
        address = waiting.pop()
        cursor = file.at(address)
        if address in seen or cursor.take(4) != b"TREE" or cursor.number("B") != 1:
            raise ValueError("the tree of its chunks is damaged")
        seen.add(address)
        level, count = cursor.number("B"), cursor.number("<H")
        cursor.skip(2 * file.offsets)
        for _ in range(count):
            nbytes, mask = cursor.number("<I"), cursor.number("<I")
            starts = [cursor.number("<Q") for _ in range(rank)]
            cursor.skip(8)
            child = file.address(cursor)
            if level:
                waiting.append(child)
            else:
                yield starts, child, nbytes, mask


def _unfiltered(data: bytearray, filters: Sequence[int], mask: int, width: int, full: int) -> bytes | bytearray:
    """A chunk without its filters, which are undone from the last to the first."""
    found: bytes | bytearray = data
    for number, identity in reversed(list(enumerate(filters))):
        if mask >> number & 1:
            continue
        if identity == _DEFLATE:
            try:
                found = zlib.decompressobj().decompress(found, full + 4)
            except zlib.error as error:
                raise ValueError(f"a chunk cannot be unpacked: {error}") from None
        elif identity == _CHECKSUM:
            found = found[:-4]
        elif identity == _SHUFFLE and width > 1:
            each = len(found) // width
            turned = bytearray(found)
            for i in range(width):
                turned[i : each * width : width] = found[i * each : (i + 1) * each]
            found = turned
    if len(found) < full:
        raise ValueError(f"a chunk has {len(found):,} bytes of {full:,}")
    return found
