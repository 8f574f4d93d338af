"""The small files beside a checkpoint that a model is of little use without: config, tokenizer, processor."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import CheckpointError, Diagnostic

__all__ = ["companions_of", "copy_companions", "refuse_file"]

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
    "chat_template",
    "spiece",
    "sentencepiece",
    "README",
    "LICENSE",
    "NOTICE",
    "USE_POLICY",
)
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".vocab", ".tiktoken", "")


def companions_of(files: tuple[str, ...]) -> Iterator[Path]:
    """Files beside the weights that belong to the model and are no weights."""
    for folder in dict.fromkeys(Path(f).parent for f in files):
        for path in sorted(folder.iterdir()):
            named = path.name.startswith(_NAMES) and path.suffix in _SUFFIXES
            if named and path.is_file() and not path.name.endswith(".index.json"):
                yield path


def refuse_file(path: Path, outputs: Sequence[str]) -> None:
    """Refuse an output that is one file, before it is written.

    Raises:
        CheckpointError: there is no folder for the companions.
    """
    if [str(path.expanduser())] == list(outputs):
        raise CheckpointError(
            Diagnostic(
                "companions-need-a-folder",
                "config and tokenizer files go along into a folder, and the output is one file",
                str(path),
                help=f"name a folder: {str(path.with_suffix(''))!r}",
            )
        )


def copy_companions(files: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Copy the companions of a checkpoint's files into a folder, over none that is there; the names copied."""
    copied = []
    for path in companions_of(files):
        target = folder / path.name
        if not target.exists():
            shutil.copyfile(path, target)
            copied.append(path.name)
    return tuple(copied)
