"""Writing safetensors: where each tensor goes, in one file or in shards with an index, before any data is there."""

from __future__ import annotations

import json
import json.encoder
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise, repeat
from pathlib import Path

from ..errors import CheckpointError, Diagnostic
from ..specs import DTYPES, TensorSpec
from .cloning import padding
from .contents import Extent
from .resuming import Journal, ResumableWriter
from .safetensors_format import MAX_HEADER
from .sharded import weight_map_of
from .staging import Output, Writer, beside, new_tag
from .text import is_text, shown_keys
from .tie_records import declared
from .transactions import Replacement

__all__ = ["file_writer", "folder_writer", "header_of"]

INDEX = "model.safetensors.index.json"
_WORTH_SHARING = 1 << 20


def file_writer(
    path: Path,
    specs: Mapping[str, TensorSpec],
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    resume: str | None = None,
    lies: Mapping[str, int] = {},
) -> Writer:
    """A writer of one safetensors file; aliases go into its metadata, as `save_model` puts them there."""
    _check(specs, aliases, metadata, str(path))
    temporary = beside(path, resume)
    layout = _lay_out(path, temporary, specs, declared(metadata, aliases, specs), lies)
    outputs, places = [layout.output(path, temporary)], layout.places
    return Writer(outputs, places) if resume is None else ResumableWriter(outputs, places, Journal(path, resume))


def folder_writer(
    path: Path,
    specs: Mapping[str, TensorSpec],
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    max_shard_size: int | None,
    resume: str | None = None,
    lies: Mapping[str, int] = {},
    companions: Mapping[str, bytes] = {},
) -> Writer:
    """A writer of a folder that `from_pretrained` loads: `model.safetensors`, or numbered shards and their index.

    A folder that does not exist yet appears as a whole. In one that does, each file is replaced atomically, the index
    last; what the former checkpoint's index named and the new one does not is removed, other files stay. Companions,
    name -> content, appear together with the rest.
    """
    _check(specs, aliases, metadata, str(path))
    shards = _split(specs, max_shard_size)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    tag = resume or new_tag()
    new_folder = None if path.exists() else (beside(path, tag), path)
    # What this library tells of an output may be long, and is told once.
    common = {name: text for name, text in metadata.items() if not name.startswith("ckptsurgery.")}
    outputs: list[Output] = []
    for name, data in companions.items():
        temporary = new_folder[0] / name if new_folder else beside(path / name, tag)
        outputs.append(Output(path / name, temporary, len(data), data, beside=True))
    places: dict[str, Extent] = {}
    for name, keys in zip(names, shards):
        held = specs if len(shards) == 1 else {key: specs[key] for key in keys}
        own = metadata if len(shards) == 1 or name == names[0] else common
        temporary = new_folder[0] / name if new_folder else beside(path / name, tag)
        layout = _lay_out(
            path / name, temporary, held, declared(own, aliases if len(shards) == 1 else {}, held), lies
        )
        outputs.append(layout.output(path / name, temporary))
        places |= layout.places
    if len(shards) > 1:
        index = _index(specs, names, shards, aliases)
        temporary = new_folder[0] / INDEX if new_folder else beside(path / INDEX, tag)
        outputs.append(Output(path / INDEX, temporary, len(index), index))
    indices, former = ([], set()) if new_folder else _former(path)
    # A run that is resumed finds its own unfinished files: they are not the former checkpoint's.
    stale = sorted(former - {path for output in outputs for path in (output.final, output.temporary)})
    if resume is None:
        return Writer(outputs, places, new_folder=new_folder, set_aside=indices, stale=stale, whole_folder=True)
    journal = Journal(path, resume)
    return ResumableWriter(
        outputs, places, journal, new_folder=new_folder, set_aside=indices, stale=stale, whole_folder=True
    )


@dataclass(frozen=True, slots=True)
class _Layout:
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
    lies: Mapping[str, int],
) -> _Layout:
    order = _order(specs)
    header = header_of(order, specs, metadata)
    if len(header) - 8 > MAX_HEADER:
        headline = f"the header would take {len(header) - 8:,} bytes, and readers accept {MAX_HEADER:,}"
        raise CheckpointError(
            Diagnostic("header-too-large", headline, str(path), help='write a folder of shards: max_shard_size="5GB"')
        )
    sizes = _sizes(order, specs)
    offsets = accumulate(sizes, initial=0)
    moved = [(lies[key], offset, size) for key, offset, size in zip(order, offsets, sizes) if key in lies]
    if sum(size for _, _, size in moved) >= _WORTH_SHARING:
        _pad(header, moved)
    starts = accumulate(sizes, initial=len(header))
    places = dict(zip(order, map(Extent, repeat(str(temporary)), starts, sizes)))
    return _Layout(header, places, len(header) + sum(sizes))


def _order(specs: Mapping[str, TensorSpec]) -> list[str]:
    # Wide elements first keeps every tensor aligned to its element size without padding, which the format has not.
    by_width: dict[int, list[str]] = {}
    for key, spec in specs.items():
        by_width.setdefault(DTYPES[spec.dtype].bits, []).append(key)
    return [key for width in sorted(by_width, reverse=True) for key in by_width[width]]


def _sizes(order: Iterable[str], specs: Mapping[str, TensorSpec]) -> list[int]:
    """The bytes of each; specs are few where tensors are many."""
    nbytes = {number: spec.nbytes for number, spec in {id(spec): spec for spec in specs.values()}.items()}
    return [nbytes[id(specs[key])] for key in order]


def _pad(header: bytearray, moved: Iterable[tuple[int, int, int]]) -> None:
    """Spaces at the header's end, so that bytes keep their place within a block, and blocks can be shared.

    Args:
        moved: offset in the source's file, offset in the data to be written, and size.
    """
    more = padding([(len(header) + offset, source, size) for source, offset, size in moved])
    if len(header) - 8 + more <= MAX_HEADER:
        header += b" " * more
        header[:8] = (len(header) - 8).to_bytes(8, "little")


def header_of(order: Sequence[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytearray:
    """The length and the text of a header, put together piece by piece: a tree of 100,000 entries would fill memory."""
    text = bytearray(8)
    text += b'{"__metadata__":' + _json({"format": "pt", **metadata}).encode()
    kinds = {id(spec): spec for spec in specs.values()}
    said = {n: _json({"dtype": s.dtype, "shape": list(s.shape)})[:-1] + ',"data_offsets":' for n, s in kinds.items()}
    rows = zip(order, pairwise(accumulate(_sizes(order, specs), initial=0)))
    while some := list(islice(rows, _ROWS)):
        text += "".join([f",{_quoted(k)}:{said[id(specs[k])]}[{a},{b}]}}" for k, (a, b) in some]).encode()
    text += b"}"
    text += b" " * (-len(text) % 8)
    text[:8] = (len(text) - 8).to_bytes(8, "little")
    return text


_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_quoted = json.encoder.encode_basestring
_ROWS = 4096


def _split(specs: Mapping[str, TensorSpec], limit: int | None) -> list[list[str]]:
    """Keys by shard, in the given order; a tensor above the limit has a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, spec in specs.items():
        nbytes = spec.nbytes
        if limit is not None and shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += nbytes
    return shards


def _index(
    specs: Mapping[str, TensorSpec], names: list[str], shards: list[list[str]], aliases: Mapping[str, str]
) -> bytes:
    size = sum(spec.nbytes for spec in specs.values())
    metadata: dict[str, object] = {"total_size": size, **declared({}, aliases, specs)}
    weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, ensure_ascii=False) + "\n").encode()


def _former(folder: Path) -> tuple[list[Path], set[Path]]:
    """The safetensors indices that lie in a folder, and the files of the checkpoint that is being replaced."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = {folder / "model.safetensors"} if (folder / "model.safetensors").exists() else set()
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


def _check(
    specs: Mapping[str, TensorSpec], aliases: Mapping[str, str], metadata: Mapping[str, str], place: str
) -> None:
    """Everything that the format cannot hold, at once."""
    problems = []

    def refuse(code: str, headline: str, keys: Iterable[str], help: str) -> None:
        if names := list(keys):
            problems.append(Diagnostic(code, headline, place, notes=shown_keys(names), help=help))

    unheld = [f"{key}  {spec}" for key, spec in specs.items() if not DTYPES[spec.dtype].safetensors]
    refuse("dtype-not-in-safetensors", "safetensors cannot hold these dtypes", unheld, "cast them, or write a .pt file")
    packed = [f"{key}  {spec}" for key, spec in specs.items() if spec.numel * DTYPES[spec.dtype].bits % 8]
    refuse("odd-packed-shape", "these tensors do not fill whole bytes", packed, "pad their last axis")
    names = [repr(name) for name in (*specs, *aliases) if name in ("", "__metadata__")]
    refuse("reserved-name", "safetensors has no place for these names", names, "rename them, or write a .pt file")
    odd = [repr(text) for text in (*specs, *aliases, *metadata, *metadata.values()) if not is_text(text)]
    refuse("bad-name", "these names or metadata are no text: they cannot be encoded as UTF-8", odd, "rename them")
    both = [key for key in aliases if key in specs or key in metadata]
    refuse("alias-clash", "these aliases are names of tensors or of metadata already", both, "give each name once")
    lost = [f"{alias} -> {kept}" for alias, kept in aliases.items() if kept not in specs]
    refuse(
        "alias-of-nothing", "these aliases stand for tensors that are not written", lost, "alias a key that is written"
    )
    wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
    refuse("bad-metadata", "metadata values must be strings", wrong, "json.dumps() them")
    if problems:
        raise CheckpointError(problems)
