"""Checkpoints at addresses: `https://`, and the object stores that fsspec knows. Headers are read, and no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin

from ...errors import CheckpointError, Diagnostic
from ..contents import Contents
from ..formats.format import OpenedSource
from ..formats.index_json import weight_map_in
from ..formats.safetensors import MAX_HEADER
from ..formats.sharded import read_index_at, read_together
from ..formats.sniffing import is_index, read_opened
from ..json_text import parse_json
from ..sources.fsspec_source import FsspecSource, file_system
from ..sources.http_source import HttpSource
from ..sources.remote import RemoteSource
from ..subtree import enter
from .choosing import Choice, Folder, choose
from .folders import all_of

__all__ = ["RemotePlace", "place_at"]

_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class RemotePlace:
    """A file or a folder at an address.

    Args:
        address: as the caller gave it.
        source: opens the file of a name in the folder; the empty name is the address itself.
        names: the names in the folder; None for a file, and where a server has no folders.
        below: gives the names one level down, with their folder in front.
    """

    address: str
    source: Callable[[str], RemoteSource]
    names: Sequence[str] | None = None
    below: Callable[[], Sequence[str]] = list

    def read(self, subtree: str | None = None, by_file: bool = False) -> Contents:
        """Return the contents, with the configuration beside them.

        Raises:
            CheckpointError: there is no such file, it is damaged, or the folder holds several checkpoints.
        """
        contents = self._file("", subtree) if self.names is None else self._folder(self.names, subtree, by_file)
        if contents.config is None and (self.names is None or "config.json" in self.names):
            contents.config = self._config()
        return contents

    def _folder(self, names: Sequence[str], subtree: str | None, by_file: bool) -> Contents:
        def shards_of(index: str) -> set[str]:
            with OpenedSource(self.source(index)) as opened:
                return set(weight_map_in(_text(opened), opened.name)[0].values())

        def path_of(name: str) -> str:
            return f"{self.address.rstrip('/')}/{name}"

        if by_file:
            text = f"by_file reads local folders, and {self.address!r} is an address"
            first = all_of(list(names), self.address).files[0]
            raise CheckpointError(
                Diagnostic("address", text, self.address, help=f"mount the files: open({{'a/': {path_of(first)!r}}})")
            )
        folder = Folder(f"the folder {self.address!r}", self.address, names, self.below, path_of, shards_of)
        choice: Choice = choose(folder)
        if choice.index or len(choice.files) == 1:
            return self._file(choice.index or choice.files[0], subtree)
        found = self._files(choice.files)
        contents = read_together("", choice.files, found.__getitem__)
        return enter(contents, subtree, self.address) if subtree else contents

    def _file(self, name: str, subtree: str | None = None) -> Contents:
        with OpenedSource(self.source(name)) as opened:
            if not (opened.size and is_index(opened)):
                return read_opened(opened, subtree)
            text, address = _text(opened), opened.name
        contents = read_index_at(text, address, self._files)
        return enter(contents, subtree, address) if subtree else contents

    def _files(self, names: Sequence[str]) -> dict[str, Contents]:
        """The contents of several files, whose headers are fetched several at a time."""

        def one(name: str) -> Contents:
            with OpenedSource(self.source(name)) as opened:
                return read_opened(opened)

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ckptsurgery") as pool:
            return dict(zip(names, pool.map(one, names)))

    def _config(self) -> Mapping[str, Any] | None:
        with suppress(CheckpointError, ValueError, RecursionError):
            with OpenedSource(self.source("config.json")) as opened:
                config = parse_json(opened.read_at(0, MAX_HEADER))
            return config if isinstance(config, dict) else None
        return None


def place_at(address: str) -> RemotePlace | str:
    """Return the place at an address, or the path where it is local.

    Raises:
        CheckpointError: the address is of a scheme that nothing installed opens.
    """
    if address.partition("://")[0].lower() in ("http", "https"):

        def over_http(name: str) -> RemoteSource:
            return HttpSource(urljoin(address, quote(name)) if name else address)

        return RemotePlace(address, over_http)
    system, path = file_system(address)
    if type(system).__name__ == "LocalFileSystem":
        return str(path)
    is_folder = _is_folder(system, path, address)
    folder = path if is_folder else path.rpartition("/")[0]
    start = address.rstrip("/") if is_folder else address.rpartition("/")[0]

    def in_store(name: str) -> RemoteSource:
        inside = f"{folder.rstrip('/')}/{name}" if name else path
        return FsspecSource(f"{start}/{name}" if name else address, system, inside)

    if not is_folder:
        return RemotePlace(address, in_store)
    names = _listed(system, path)
    return RemotePlace(
        address, in_store, names, lambda: [f"{n}/{m}" for n in names for m in _listed(system, f"{path}/{n}")]
    )


def _is_folder(system: Any, path: str, address: str) -> bool:
    try:
        return bool(system.isdir(path))
    except (OSError, ValueError) as error:
        text, help = f"{address!r} cannot be reached: {error}", "check the credentials and the connection"
        raise CheckpointError(Diagnostic("download-failed", text, address, help=help)) from error


def _listed(system: Any, path: str) -> list[str]:
    with suppress(OSError):
        return sorted({str(name).rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False)} - {""})
    return []


def _text(opened: OpenedSource) -> str:
    return opened.read_at(0, MAX_HEADER).decode("utf-8", "replace")
