"""`open`: what a source is, judged by its content, and the reader that knows it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import CheckpointError, Diagnostic
from ...many_objects import gc_pause
from ..checkpoint import Checkpoint
from ..contents import Contents
from ..formats.recognising import address_problem
from ..formats.sniffing import FileReader
from ..sources.system_errors import os_error
from ..subtree import enter
from .config_files import config_beside

__all__ = ["open"]


def open(
    source: Any,
    subtree: str | None = None,
    by_file: bool = False,
    *,
    component: str | None = None,
    file: str | None = None,
    download: bool = False,
) -> Checkpoint:
    """Open a file, a folder, a repository of the hub, tensors in memory, or several of these under prefixes.

    >>> open("no-such-file.safetensors")
    Traceback (most recent call last):
        ...
    ckptsurgery.errors.CheckpointError: error[missing-file]: no such file or folder: 'no-such-file.safetensors'
    ...

    Args:
        source: a path, `"hf://org/repo[@rev][/file]"`, an address such as `https://…` or `s3://…`, a state_dict,
            `{key: TensorSpec}`, an `nn.Module`, a `Checkpoint` (given back as it is), or `{prefix: source}`, which puts
            each prefix before its source's keys.
        subtree: a dotted path to what should be read, such as `"ema.module"`.
        by_file: for a folder: read each file on its own, with "file stem/" before its keys.
        component: for a folder of several models, such as a diffusers root: the folder below to read, such as `"vae"`;
            all of them by default, with `"vae."` before the keys.
        file: for a folder: the file to read, relative to it.
        download: for `hf://`: fetch whole files into the hub's cache. By default headers and the ranges that are needed
            are fetched, and files that the cache holds already are read there.

    Raises:
        CheckpointError: the source is missing, damaged, ambiguous or of no known format.
    """
    within = Within(by_file, component, download)
    if file is not None:
        source = _file_in(source, file)
    with gc_pause():
        if isinstance(source, Checkpoint):
            if not subtree:
                return source
            return Checkpoint(enter(source.contents, subtree, source.source), source.source)
        if isinstance(source, (str, os.PathLike)):
            return _open_path(os.fspath(source), subtree, within)
        return _open_object(source, subtree)


class Within(NamedTuple):
    """Which of the models in a folder are read, and how those of the hub are fetched."""

    by_file: bool = False
    component: str | None = None
    download: bool = False


def _file_in(source: Any, file: str) -> str:
    """The path or address of a file in a folder."""
    if not isinstance(source, (str, os.PathLike)):
        text = f"file= names a file in a folder, and the source is a {type(source).__name__}"
        raise CheckpointError(Diagnostic("bad-source", text, help="give the folder's path or address"))
    return f"{os.fsdecode(os.fspath(source)).rstrip('/')}/{file}"


def _open_path(path: str | bytes, subtree: str | None, within: Within) -> Checkpoint:
    path = os.fsdecode(path)
    if not path:
        # Path("") is the current folder, which an unset variable in a shell does not mean
        raise CheckpointError(Diagnostic("bad-source", "the source has no name", help="name a file or a folder"))
    if path.startswith("hf://"):
        from .hub import read_hub

        return Checkpoint(read_hub(path, subtree, within.by_file, within.component, within.download), path)
    if "://" in path:
        problem = address_problem(path)
        if problem is not None:
            raise CheckpointError(problem)
        from .addresses import place_at

        found = place_at(path)
        if not isinstance(found, str):
            return Checkpoint(found.read(subtree, within.by_file, within.component), path)
        return _open_path(found, subtree, within)
    try:
        expanded = str(Path(path).expanduser())
    except RuntimeError as error:  # a home that is not known
        raise os_error(OSError(str(error)), path) from error
    try:
        return Checkpoint(_read_path(expanded, subtree, within), path)
    except OSError as error:
        raise os_error(error, path) from error


def _read_path(path: str, subtree: str | None, within: Within) -> Contents:
    if Path(path).is_dir():
        from .folders import read_folder  # a file needs none of what lies in folders

        return read_folder(path, subtree, within.by_file, within.component)
    contents = FileReader().read(path, subtree)
    if contents.config is None:
        contents.config = config_beside(Path(path).parent, (Path(path).name,))
    return contents


def _open_object(source: Any, subtree: str | None) -> Checkpoint:
    from ..header_sources import is_headers, read_headers
    from ..memory import is_module, read_mapping, read_module
    from .mounts import is_mounts, read_mounts

    if is_module(source):
        contents = read_module(source)
        return Checkpoint(
            enter(contents, subtree, type(source).__name__) if subtree else contents, type(source).__name__
        )
    if isinstance(source, Mapping):
        if is_headers(source):
            return Checkpoint(read_headers(source), "headers")
        if is_mounts(source):
            contents = read_mounts(source, open)
            return Checkpoint(enter(contents, subtree, "mounts") if subtree else contents, "mounts")
        return Checkpoint(read_mapping(source, subtree), "state_dict")
    text = f"{type(source).__name__!r} object is not a checkpoint"
    raise CheckpointError(Diagnostic("bad-source", text, help=_source_instead(source)))


def _source_instead(source: Any) -> str:
    """What to pass in the place of an object that is often passed by mistake."""
    if callable(getattr(source, "state_dict", None)):
        return "pass its .state_dict()"
    if callable(getattr(source, "read", None)):
        return "pass the file's path; of a file in memory, the state dict that torch.load returns"
    if isinstance(source, Iterator):
        return "pass dict(…) of it, if it yields names and tensors, as model.named_parameters() does"
    return "a path, 'hf://org/repo', a state_dict, an nn.Module, or {prefix: source}"
