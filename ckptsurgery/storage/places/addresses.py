"""Checkpoints at addresses: `https://`, and the object stores that fsspec knows. Headers are read, and no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin

from ...errors import CheckpointError
from ..contents import Contents
from ..formats.format import OpenedSource
from ..formats.index_json import weight_map_in
from ..formats.safetensors import MAX_HEADER
from ..formats.sharded import read_index_at, read_together
from ..formats.sniffing import is_index, read_opened
from ..json_text import parse_json
from ..sources.byte_source import ByteSource
from ..sources.fsspec_source import FsspecSource, file_system, unreachable
from ..sources.http_source import HttpSource
from ..subtree import enter
from .choosing import Choice, Folder
from .component_folders import Component, parts_of
from .config_files import config_names
from .folders import all_of
from .mounts import join_mounts

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
    source: Callable[[str], ByteSource]
    names: Sequence[str] | None = None
    below: Callable[[], Sequence[str]] = list

    def read(self, subtree: str | None = None, by_file: bool = False, component: str | None = None) -> Contents:
        """Return the contents, with the configuration beside them.

        Raises:
            CheckpointError: there is no such file, it is damaged, or the folder holds several checkpoints.
        """
        if self.names is None:
            contents = self._file("", subtree)
            contents.config = contents.config or self._config("", config_names((self.address.partition("?")[0],)))
            return contents
        return self._folder(self.names, subtree, by_file, component)

    def _folder(self, names: Sequence[str], subtree: str | None, by_file: bool, component: str | None) -> Contents:
        def shards_of(index: str) -> set[str]:
            with OpenedSource(self.source(index)) as opened:
                return set(weight_map_in(_text(opened), opened.name)[0].values())

        def path_of(name: str) -> str:
            return f"{self.address.rstrip('/')}/{name}"

        if by_file:
            chosen = all_of(list(names), self.address)
            parts = [Component(f"{name.rpartition('.')[0]}/", "", Choice(files=(name,))) for name in chosen.files]
        else:
            folder = Folder(f"the folder {self.address!r}", self.address, names, self.below, path_of, shards_of)
            parts = parts_of(folder, self._bytes, component)
        return self.read_parts(parts, subtree)

    def read_parts(self, parts: Sequence[Component], subtree: str | None = None) -> Contents:
        """Return the contents of parts of the folder, each under its prefix.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        names = self.names or ()
        if len(parts) == 1 and not parts[0].prefix:
            return self._part(parts[0], names, subtree)
        joined = join_mounts({part.prefix: self._part(part, names) for part in parts}, self.address)
        return enter(joined, subtree, self.address) if subtree else joined

    def _part(self, part: Component, names: Sequence[str], subtree: str | None = None) -> Contents:
        """The contents of a part, with the configuration beside it."""
        before = f"{part.folder}/" if part.folder else ""
        files = [before + name for name in part.names]
        if part.choice.alone is not None:
            contents = self._file(before + part.choice.alone, subtree)
        else:
            found = self._files(files)
            contents = read_together("", files, found.__getitem__)
            contents = enter(contents, subtree, self.address) if subtree else contents
        present = {*names, *(self.below() if before else ())}
        wanted = tuple(name for name in config_names(part.names) if before + name in present)
        contents.config = contents.config or self._config(before, wanted)
        return contents

    def _bytes(self, name: str) -> bytes:
        with OpenedSource(self.source(name)) as opened:
            return opened.read_at(0, MAX_HEADER)

    def _file(self, name: str, subtree: str | None = None) -> Contents:
        with OpenedSource(self.source(name)) as opened:
            if not (opened.size and is_index(opened)):
                return read_opened(opened, subtree)
            text, address = _text(opened), opened.name
        folder = name.rpartition("/")[0]
        before = f"{folder}/" if folder else ""
        contents = read_index_at(text, address, lambda shards: self._shards(before, shards))
        return enter(contents, subtree, address) if subtree else contents

    def _shards(self, before: str, names: Sequence[str]) -> dict[str, Contents]:
        """The contents of the shards that an index in a folder names."""
        return {name.removeprefix(before): found for name, found in self._files([before + n for n in names]).items()}

    def _files(self, names: Sequence[str]) -> dict[str, Contents]:
        """The contents of several files, whose headers are fetched several at a time."""

        def one(name: str) -> Contents:
            with OpenedSource(self.source(name)) as opened:
                return read_opened(opened)

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ckptsurgery") as pool:
            return dict(zip(names, pool.map(one, names)))

    def _config(self, before: str, names: Sequence[str]) -> Mapping[str, Any] | None:
        for name in names:
            with suppress(CheckpointError, ValueError, RecursionError):
                config = parse_json(self._bytes(before + name))
                if isinstance(config, dict):
                    return config
        return None


def place_at(address: str) -> RemotePlace | str:
    """Return the place at an address, or the path where it is local.

    Raises:
        CheckpointError: the address is of a scheme that nothing installed opens.
    """
    if address.partition("://")[0].lower() in ("http", "https"):

        def over_http(name: str) -> ByteSource:
            return HttpSource(urljoin(address, quote(name)) if name else address)

        return RemotePlace(address, over_http)
    system, path = file_system(address)
    if type(system).__name__ == "LocalFileSystem":
        return str(path)
    is_folder = _is_folder(system, path, address)
    folder = path if is_folder else path.rpartition("/")[0]
    start = address.rstrip("/") if is_folder else address.rpartition("/")[0]

    def in_store(name: str) -> ByteSource:
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
    except Exception as error:  # the clients of stores have errors of their own, such as for missing credentials
        raise unreachable(address, error) from error


def _listed(system: Any, path: str) -> list[str]:
    with suppress(OSError):
        return sorted({str(name).rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False)} - {""})
    return []


def _text(opened: OpenedSource) -> str:
    return opened.read_at(0, MAX_HEADER).decode("utf-8", "replace")
