"""Safetensors files that each hold one rank's chunks, as torch's distributed storage for Hugging Face writes them.

The files are called `shard-RANK-model-N-of-M.safetensors`. A key is in several of them, and each file's metadata gives
the index at which its part of the tensor begins. Nothing gives the shape of the whole: it is where the parts end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...boxes import covers_once
from ...errors import CheckpointError, Diagnostic
from ...specs import DTYPES, TensorSpec
from ...wording import shown_keys
from ..chunked_tensors import Chunk, Chunked, unaligned
from ..contents import Contents, Entry
from ..json_text import parse_json
from ..subtree import enter
from .sniffing import FileReader

__all__ = ["rank_files_in", "read_rank_files"]

_NAME = re.compile(r"shard-(\d+)-model-\d+-of-\d+\.safetensors")
_INFO = "DCP_SHARDING_INFO"
_OWN = {_INFO, "DCP_VERSION", "format"}


def rank_files_in(names: Iterable[str]) -> list[str]:
    """The names that such files have, in order.

    >>> rank_files_in(["model.safetensors", "shard-00002-model-00001-of-00001.safetensors"])
    ['shard-00002-model-00001-of-00001.safetensors']
    """
    return sorted(filter(_NAME.fullmatch, names))


def read_rank_files(folder: str, names: list[str], subtree: str | None = None) -> Contents:
    """The tensors whose chunks are in such files.

    Raises:
        CheckpointError: a rank's file is missing, or the chunks of a tensor overlap or leave some of it out.
    """
    ranks = {int(match[1]) for match in map(_NAME.fullmatch, names) if match}
    missing = [rank for rank in range(1, max(ranks) + 1) if rank not in ranks]
    if missing:
        text = f"{folder!r} holds no file of rank {missing[0]}"
        raise CheckpointError(Diagnostic("missing-shard", text, folder, help="copy the missing file too"))
    joined = Contents({})
    chunks: dict[str, list[Chunk]] = {}
    for name in names:
        part = FileReader().read_shard(str(Path(folder, name)))
        offsets = _offsets(part.metadata, name, folder)
        for key, entry in part.entries.items():
            chunks.setdefault(key, []).append(Chunk(offsets.get(key, (0,) * len(entry.spec.shape)), entry))
        joined.sources |= part.sources
        joined.join_facts([Contents({}, metadata={k: text for k, text in part.metadata.items() if k not in _OWN})])
    torn = [key for key, some in chunks.items() if not _fit(some)]
    if torn:
        text = f"the chunks of {torn[0]!r} in {folder!r} overlap, or leave some of it out"
        raise CheckpointError(
            Diagnostic("bad-chunks", text, folder, notes=shown_keys(torn[1:]), help="copy the files of all ranks")
        )
    joined.entries = {key: _entry(some, folder) for key, some in chunks.items()}
    return enter(joined, subtree, folder) if subtree else joined


def _offsets(metadata: Mapping[str, str], name: str, folder: str) -> dict[str, tuple[int, ...]]:
    """Key -> where its chunk begins, as a file's metadata has it."""
    try:
        info: Any = parse_json(metadata.get(_INFO, "{}").encode())
        return {key: tuple(map(_whole, about["saved_offsets"])) for key, about in info.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        text = f"the metadata of {name!r} does not say where its chunks begin"
        raise CheckpointError(Diagnostic("bad-metadata", text, folder, help="write the checkpoint again")) from None


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _shape(chunks: list[Chunk]) -> tuple[int, ...]:
    return tuple(map(max, *(chunk.box.high for chunk in chunks))) if len(chunks) > 1 else chunks[0].box.high


def _fit(chunks: list[Chunk]) -> bool:
    """Whether chunks are of one dtype and cover a tensor once."""
    first = chunks[0].place.spec
    if any(chunk.place.spec.dtype != first.dtype or len(chunk.low) != len(first.shape) for chunk in chunks):
        return False
    if any(len(chunk.place.spec.shape) != len(first.shape) for chunk in chunks):
        return False
    boxes = [chunk.box for chunk in chunks if chunk.box.numel]
    return covers_once(_shape(chunks), boxes)


def _entry(chunks: list[Chunk], folder: str) -> Entry:
    full = [chunk for chunk in chunks if chunk.box.numel]
    spec = TensorSpec(_shape(chunks), chunks[0].place.spec.dtype)
    if len(full) < 2:
        entry = (full or chunks)[0].place
        return entry if isinstance(entry, Entry) and entry.spec == spec else Entry(spec, chunks[0].place.file)
    if DTYPES[spec.dtype].bits % 8:
        raise unaligned(spec, folder)
    return Entry(spec, tensor=Chunked(spec, tuple(full)))
