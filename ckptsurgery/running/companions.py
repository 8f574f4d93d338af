"""The small files beside a checkpoint that a model is of little use without: config, tokenizer, processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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


def companions_of(files: tuple[str, ...]) -> Iterator[Path]:
    """Files beside the weights that belong to the model and are no weights; those of the hub come into its cache."""
    for place in dict.fromkeys(file.rpartition("/")[0] for file in files if file.startswith("hf://")):
        from ..storage.places.hub import small_files  # what reads local files needs no client of the hub

        yield from small_files(place, _is_companion)
    for folder in dict.fromkeys(Path(f).parent for f in files):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():  # an address has no folder here
            if _is_companion(path.name) and path.is_file():
                yield path


def _is_companion(name: str) -> bool:
    return name.startswith(_NAMES) and Path(name).suffix in _SUFFIXES and not name.endswith(".index.json")


def companions_for(files: tuple[str, ...], folder: Path, overwrite: bool = False) -> dict[str, bytes]:
    """Return the companions of a checkpoint's files that a folder has not yet: name -> content.

    Args:
        overwrite: whether those that it has are replaced, unless they are the same files.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    found: dict[str, bytes] = {}
    for path in companions_of(files):
        there = folder / path.name
        if not there.exists() or (overwrite and not there.samefile(path)):
            try:
                found.setdefault(path.name, path.read_bytes())
            except OSError as error:
                raise os_error(error, str(path)) from error
    return found
