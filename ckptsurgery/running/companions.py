"""The small files beside a checkpoint that a model is of little use without: config, tokenizer, processor."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from ..storage.json_text import parse_json
from ..storage.places.component_folders import SENTENCES as MODULES
from ..storage.sources.files import read_regular
from ..storage.sources.system_errors import os_error

__all__ = ["companions_for", "companions_of"]

_NAMES = (
    "config",
    "generation_config",
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "preprocessor",
    "processor",
    "video_preprocessor",
    "chat_template",
    "modules",
    "sentence_",
    "quantize_config",
    "quant_config",
    "hf_quant_config",
    "spiece",
    "sentencepiece",
    "README",
    "LICENSE",
    "NOTICE",
    "USE_POLICY",
)
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".vocab", ".tiktoken", "")


def companions_of(files: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Yield name and path of files beside the weights that belong to the model and are no weights.

    Those of the hub come into its cache. Modules of a sentence-transformers model have their own folders, whose files
    are named with these (`1_Pooling/config.json`).
    """
    for place in dict.fromkeys(file.rpartition("/")[0] for file in files if file.startswith("hf://")):
        from ..storage.places.hub import small_files  # what reads local files needs no client of the hub

        found = small_files(place, _is_companion)
        yield from found.items()
        if modules := _modules(found.get(MODULES)):
            yield from small_files(place, partial(_is_inner, folders=modules)).items()
    for folder in dict.fromkeys(Path(f).parent for f in files):
        if not folder.is_dir():
            continue  # an address has no folder here
        below = _modules(folder / MODULES)
        folders = [folder, *(folder / name for name in sorted(below) if (folder / name).is_dir())]
        for path in sorted(path for one in folders for path in one.iterdir()):
            name = path.relative_to(folder).as_posix()
            if (_is_companion(name) or _is_inner(name, below)) and path.is_file():
                yield name, path


def _modules(path: Path | None) -> frozenset[str]:
    """The folders below that a list of modules names."""
    try:
        told = parse_json(read_regular(path)) if path is not None else None
    except (OSError, ValueError, RecursionError):
        return frozenset()
    paths = [row.get("path") for row in told if isinstance(row, dict)] if isinstance(told, list) else []
    return frozenset(path for path in paths if isinstance(path, str) and path and "/" not in path and path[0] != ".")


def _is_companion(name: str) -> bool:
    return (
        "/" not in name
        and name.startswith(_NAMES)
        and Path(name).suffix in _SUFFIXES
        and not name.endswith(".index.json")
    )


def _is_inner(name: str, folders: Collection[str]) -> bool:
    """Whether a file is a companion in one of some folders below."""
    folder, _, inner = name.partition("/")
    return folder in folders and _is_companion(inner)


def companions_for(files: tuple[str, ...], folder: Path, overwrite: bool = False) -> dict[str, bytes]:
    """Return the companions of a checkpoint's files that a folder has not yet: name -> content.

    Args:
        overwrite: whether those that it has are replaced, unless they are the same files.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    found: dict[str, bytes] = {}
    for name, path in companions_of(files):
        there = folder / name
        if not there.exists() or (overwrite and not there.samefile(path)):
            try:
                found.setdefault(name, path.read_bytes())
            except OSError as error:
                raise os_error(error, str(path)) from error
    return found
