"""Writing safetensors: where each tensor goes, in one file or in shards with an index, before any data is there."""

from __future__ import annotations

import json
import json.encoder
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain, compress, islice, repeat, tee
from pathlib import Path

from ...errors import CheckpointError, Diagnostic, Remedy
from ...many_objects import ById
from ...specs import DTYPES, TensorSpec
from ...wording import is_text, shown_keys
from ..contents import Extent
from ..formats.format import Announced
from ..formats.index_json import weight_map_of
from ..formats.safetensors import MAX_HEADER
from ..metadata_records import declared
from ..sources.kernel_copies import padding
from .resuming import Journal, ResumableWriter
from .staging import FolderChange, Output, Writer, beside, new_tag
from .transactions import Replacement

__all__ = ["file_writer", "folder_writer", "header_of"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WORTH_SHARING = 1 << 20


def file_writer(announced: Announced) -> Writer:
    """A writer of one safetensors file; aliases go into its metadata, as `save_model` puts them there."""
    path, specs, resume = announced.path, announced.specs, announced.resume
    _check(announced)
    temporary = beside(path, resume)
    metadata = declared(announced.metadata, announced.aliases, specs)
    layout = _lay_out(path, temporary, specs, metadata, announced.source_offsets)
    outputs, places = [layout.output(path, temporary)], layout.places
    if resume is None:
        return Writer(outputs, places, durability=announced.durability)
    return ResumableWriter(outputs, places, Journal(path, resume))


def folder_writer(announced: Announced, max_shard_size: int | None, companions: Mapping[str, bytes] = {}) -> Writer:
    """A writer of a folder that `from_pretrained` loads: `model.safetensors`, or numbered shards and their index.

    A folder that does not exist yet appears as a whole. In one that does, each file is replaced atomically, the index
    last; what the former checkpoint's index named and the new one does not is removed, other files stay. Companions,
    name -> content, appear together with the rest.
    """
    path, resume = announced.path, announced.resume
    _check(announced)
    tag = resume or new_tag()
    folder = _StagingFolder(path, tag, None if path.exists() else beside(path, tag))
    outputs = [folder.whole(name, data, beside=True) for name, data in companions.items()]
    laid, places = _shards(folder, announced, max_shard_size)
    outputs += laid
    new_folder = (folder.new, path) if folder.new else None
    indices, former = ([], set()) if new_folder else _former(path)
    # A run that is resumed finds its own unfinished files: they are not the former checkpoint's.
    stale = sorted(former - {path for output in outputs for path in (output.final, output.temporary)})
    change = FolderChange(new_folder, indices, stale)
    if resume is None:
        return Writer(outputs, places, change, announced.durability)
    return ResumableWriter(outputs, places, Journal(path, resume), change)


@dataclass(frozen=True, slots=True)
class _StagingFolder:
    """Where files lie until they take their names: in a new folder beside the one meant, or each beside its own."""

    path: Path
    tag: str
    new: Path | None

    def temporary(self, name: str) -> Path:
        return self.new / name if self.new else beside(self.path / name, self.tag)

    def whole(self, name: str, data: bytes, beside: bool = False) -> Output:
        return Output(self.path / name, self.temporary(name), len(data), data, beside=beside)


def _shards(
    folder: _StagingFolder, announced: Announced, max_shard_size: int | None
) -> tuple[list[Output], dict[str, Extent]]:
    """The files that hold the tensors, their index where they are several, and where in them each tensor goes."""
    specs, aliases, metadata = announced.specs, announced.aliases, announced.metadata
    shards = _split(specs, max_shard_size)
    if len(shards) == 1:
        file, temporary = folder.path / SINGLE, folder.temporary(SINGLE)
        layout = _lay_out(file, temporary, specs, declared(metadata, aliases, specs), announced.source_offsets)
        return [layout.output(file, temporary)], layout.places
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    # What this library tells of an output may be long, and is told once.
    common = {name: text for name, text in metadata.items() if not name.startswith("ckptsurgery.")}
    outputs: list[Output] = []
    places: dict[str, Extent] = {}
    for name, keys in zip(names, shards):
        held = {key: specs[key] for key in keys}
        own = declared(metadata if name == names[0] else common, {}, held)
        layout = _lay_out(folder.path / name, folder.temporary(name), held, own, announced.source_offsets)
        outputs.append(layout.output(folder.path / name, folder.temporary(name)))
        places |= layout.places
    return [*outputs, folder.whole(INDEX, _index(specs, names, shards, aliases))], places


@dataclass(frozen=True, slots=True)
class _FileLayout:
    header: bytearray
    places: dict[str, Extent]
    size: int

    def output(self, final: Path, temporary: Path) -> Output:
        return Output(final, temporary, self.size, self.header)


def _lay_out(
    path: Path,
    temporary: Path,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    source_offsets: Mapping[str, int],
) -> _FileLayout:
    kinds = ById(specs.values())
    if len({DTYPES[spec.dtype].bits for spec in kinds.objects.values()}) > 1:
        specs = _falling(specs, kinds)
        kinds = ById(specs.values())
    header = _header(specs, kinds, metadata)
    if len(header) - 8 > MAX_HEADER:
        headline = f"the header would take {len(header) - 8:,} bytes, and readers accept {MAX_HEADER:,}"
        raise CheckpointError(
            Diagnostic(
                "header-too-large",
                headline,
                str(path),
                remedies=(Remedy("max_shard_size", "5GB", "writes shards into a folder"),),
            )
        )
    sizes = _sizes(kinds)
    rows = zip(specs, accumulate(sizes, initial=0), sizes)
    copied = compress(rows, map(source_offsets.__contains__, specs))
    moved = [(source_offsets[key], offset, size) for key, offset, size in copied]
    if sum(size for _, _, size in moved) >= _WORTH_SHARING:
        _pad(header, moved)
    extents = zip(repeat(str(temporary)), accumulate(sizes, initial=len(header)), sizes)
    places = dict(zip(specs, map(tuple.__new__, repeat(Extent), extents)))
    return _FileLayout(header, places, len(header) + sum(sizes))


def _falling(specs: Mapping[str, TensorSpec], kinds: ById[TensorSpec]) -> Mapping[str, TensorSpec]:
    # Wide elements first keeps every tensor aligned to its element size without padding, which the format has not.
    widths = kinds.each(lambda spec: DTYPES[spec.dtype].bits)
    falling = sorted({*widths}, reverse=True)
    return dict(chain.from_iterable(compress(specs.items(), map(width.__eq__, widths)) for width in falling))


def _sizes(kinds: ById[TensorSpec]) -> list[int]:
    return kinds.each(lambda spec: spec.nbytes)


def _pad(header: bytearray, moved: Iterable[tuple[int, int, int]]) -> None:
    """Spaces at the header's end, so that bytes keep their place within a block, and blocks can be shared.

    Args:
        moved: offset in the source's file, offset in the data to be written, and size.
    """
    more = padding([(len(header) + offset, source, size) for source, offset, size in moved])
    if len(header) - 8 + more <= MAX_HEADER:
        header += b" " * more
        header[:8] = (len(header) - 8).to_bytes(8, "little")


def header_of(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytearray:
    """The length and the text of a header for tensors that lie in this order."""
    return _header(specs, ById(specs.values()), metadata)


def _header(names: Iterable[str], kinds: ById[TensorSpec], metadata: Mapping[str, str]) -> bytearray:
    # It is put together piece by piece: a tree of 100,000 entries would fill memory.
    text = bytearray(8)
    text += b'{"__metadata__":' + _json({"format": "pt", **metadata}).encode()
    facts = kinds.each(lambda spec: _json({"dtype": spec.dtype, "shape": spec.shape})[:-1] + ',"data_offsets":')
    starts, stops = tee(map(str, accumulate(_sizes(kinds), initial=0)))
    next(stops)
    rows = zip(map(_quoted, names), facts, starts, stops)
    while some := "".join([f",{key}:{fact}[{start},{stop}]}}" for key, fact, start, stop in islice(rows, _ROWS)]):
        text += some.encode()
    text += b"}"
    text += b" " * (-len(text) % 8)
    text[:8] = (len(text) - 8).to_bytes(8, "little")
    return text


_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_quoted = json.encoder.encode_basestring
_ROWS = 4096


def _split(specs: Mapping[str, TensorSpec], limit: int | None) -> list[list[str]]:
    """Keys by shard, in the given order; a tensor above the limit has a shard of its own."""
    if limit is None:
        return [list(specs)]
    shards: list[list[str]] = [[]]
    filled = 0
    for key, nbytes in zip(specs, _sizes(ById(specs.values()))):
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += nbytes
    return shards


def _index(
    specs: Mapping[str, TensorSpec], names: list[str], shards: list[list[str]], aliases: Mapping[str, str]
) -> bytes:
    size = sum(_sizes(ById(specs.values())))
    metadata = declared({"total_size": ""}, aliases, specs) | {"total_size": size}
    head = json.dumps({"metadata": metadata, "weight_map": {}}, indent=2, ensure_ascii=False).removesuffix("}\n}")
    rows = (f": {_quoted(name)},\n    ".join([*map(_quoted, keys), ""]) for name, keys in zip(names, shards))
    return (head + "\n    " + "".join(rows).removesuffix(",\n    ") + "\n  }\n}\n").encode()


def _former(folder: Path) -> tuple[list[Path], set[Path]]:
    """The safetensors indices that lie in a folder, and the files of the checkpoint that is being replaced."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = {folder / SINGLE} if (folder / SINGLE).exists() else set()
    for index in indices:
        try:
            weight_map, _ = weight_map_of(str(index))
        except CheckpointError:
            continue  # a broken index, or one that points elsewhere, is replaced, and nothing is removed on its word
        files |= {folder / name for name in weight_map.values()}
    unfinished = Replacement.read(folder)
    if unfinished is not None:
        # What it decided is replaced as a whole, wherever the renaming was broken off.
        pairs = unfinished.renamed
        files |= {folder / name for name in (*unfinished.removed, *(name for pair in pairs for name in pair))}
    return indices, {file for file in files if file.exists() and file not in indices}


def _check(announced: Announced) -> None:
    """Everything that the format cannot hold, at once."""
    specs, aliases, metadata, place = announced.specs, announced.aliases, announced.metadata, str(announced.path)
    problems = []
    kinds = ById(specs.values()).objects.values()

    def refuse(code: str, headline: str, keys: Iterable[str], help: str) -> None:
        if names := list(keys):
            problems.append(Diagnostic(code, headline, place, notes=shown_keys(names), help=help))

    def having(wrong: Callable[[TensorSpec], bool]) -> Iterator[str]:
        if any(map(wrong, kinds)):
            yield from (f"{key}  {spec}" for key, spec in specs.items() if wrong(spec))

    unheld = having(lambda spec: not DTYPES[spec.dtype].safetensors)
    refuse("dtype-not-in-safetensors", "safetensors cannot hold these dtypes", unheld, "cast them, or write a .pt file")
    packed = having(lambda spec: spec.numel * DTYPES[spec.dtype].bits % 8 != 0)
    refuse("odd-packed-shape", "these tensors do not fill whole bytes", packed, "pad their last axis")
    names = [repr(name) for name in ("", "__metadata__") if name in specs or name in aliases]
    refuse("reserved-name", "safetensors has no place for these names", names, "rename them, or write a .pt file")
    every = is_text("".join(chain(specs, aliases, metadata))) and all(map(is_text, metadata.values()))
    texts = () if every else (*specs, *aliases, *metadata, *metadata.values())
    odd = [repr(text) for text in texts if not is_text(text)]
    refuse("bad-name", "these names or metadata are no text: they cannot be encoded as UTF-8", odd, "rename them")
    both = [key for key in aliases if key in specs]
    refuse("alias-clash", "these aliases are names of tensors already", both, "give each name once")
    lost = [f"{alias} -> {kept}" for alias, kept in aliases.items() if kept not in specs]
    refuse(
        "alias-of-nothing", "these aliases stand for tensors that are not written", lost, "alias a key that is written"
    )
    wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
    refuse("bad-metadata", "metadata values must be strings", wrong, "json.dumps() them")
    if problems:
        raise CheckpointError(problems)
