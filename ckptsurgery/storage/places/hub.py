"""Repositories of the hub: which files are needed; their ranges are fetched, or whole files through the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...errors import CheckpointError, Diagnostic
from ...wording import counted, shown_keys
from ..contents import Contents
from ..formats.index_json import weight_map_of
from ..sources.byte_source import ByteSource, LocalFile
from ..sources.http_source import HttpSource
from .addresses import RemotePlace
from .choosing import OTHERS, SUFFIXES, Choice, Folder
from .component_folders import Component, parts_of
from .config_files import config_names
from .folders import all_of, read_choice, read_parts

__all__ = ["Location", "read_hub", "small_files"]

_LOCATION = re.compile(
    r"hf://(?P<repo>[^/@]+(?:/[^/@]+)?)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<inside>.+?))?/?"
)


@dataclass(frozen=True, slots=True)
class Location:
    """A place on the hub.

    >>> Location.parse("hf://org/repo@refs/pr/1/sub/model.safetensors")
    Location(repo='org/repo', revision='refs/pr/1', inside='sub/model.safetensors')
    """

    repo: str
    revision: str | None
    inside: str | None

    @classmethod
    def parse(cls, text: str) -> Location:
        """A location from `hf://org/repo[@rev][/file or folder]`.

        Raises:
            CheckpointError: it is none.
        """
        match = _LOCATION.fullmatch(text)
        if match is None or ".." in text.split("/"):
            raise CheckpointError(
                Diagnostic(
                    "bad-hub-path", f"{text!r} names no repository", help="hf://org/repo, hf://org/repo@rev/file"
                )
            )
        return cls(match["repo"], match["revision"], match["inside"])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.inside}" if self.inside else "")

    @property
    def prefix(self) -> str:
        """What stands before the names in this location."""
        return f"{self.inside}/" if self.inside else ""

    @property
    def names_file(self) -> bool:
        """Whether the part inside of the repository is a file, judged by its suffix."""
        return self.inside is not None and self.inside.endswith((*SUFFIXES, *OTHERS, ".json"))


def read_hub(
    text: str,
    subtree: str | None = None,
    by_file: bool = False,
    component: str | None = None,
    download: bool = False,
) -> Contents:
    """What a place on the hub holds.

    The files are chosen among the names in the repository as they are in a folder (see `choosing` and
    `component_folders`). Headers, and later the ranges that are needed, are fetched; what the cache holds is read
    there. `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and the token work as for every user of huggingface_hub.

    Args:
        text: the address.
        subtree, by_file, component: as `open_checkpoint` has them.
        download: fetch whole files into the cache, and read them there; so it is done offline in any case.

    Raises:
        CheckpointError: no such repository, revision or file; no access; offline and not in the cache; several
            checkpoints.
    """
    location = Location.parse(text)
    file = None
    if location.names_file:
        folder, _, file = f"/{location.inside}".rpartition("/")
        location = Location(location.repo, location.revision, folder[1:] or None)
    listing = _listing(location)
    if listing.commit is None or download:
        root, parts = _fetched(location, file, listing.names, by_file, component)
        if by_file:
            return read_choice(root, parts[0].choice, subtree)
        return read_parts(root, parts, subtree)
    repository = _Repository(location, listing.commit, frozenset(listing.names))
    inside = listing.inside(location)
    if file is not None:
        names: Sequence[str] = [file, *(name for name in inside if name.endswith(".json") and "/" not in name)]
        if location.prefix + file not in repository.names:
            raise _no_file(Location(location.repo, location.revision, location.prefix + file))
        place = RemotePlace(str(location), repository.source, names)
        chosen = Choice(index=file) if file.endswith(".json") else Choice(files=(file,))
        return place.read_parts([Component("", "", chosen)], subtree)
    tops = list(dict.fromkeys(name.partition("/")[0] for name in inside))
    below = [name for name in inside if name.count("/") == 1]
    return RemotePlace(str(location), repository.source, tops, lambda: below).read(subtree, by_file, component)


def small_files(place: str, wanted: Callable[[str], bool]) -> dict[str, Path]:
    """Return names and local paths of files of a folder on the hub; what the cache does not hold is downloaded.

    Args:
        place: the folder, as `hf://org/repo[@rev][/folder]`.
        wanted: whether a name is wanted; names of files in folders below contain slashes.

    Raises:
        CheckpointError: the repository cannot be reached.
    """
    location = Location.parse(place)
    names = filter(wanted, _listing(location).inside(location))
    return {name: Path(_download_all(location, [name])) for name in names}


class _RepositoryNames(NamedTuple):
    """The files of a repository, and the commit that was asked; None for what the cache holds of it."""

    names: Sequence[str]
    commit: str | None

    def inside(self, location: Location) -> list[str]:
        """The names in a location, relative to it."""
        return [name.removeprefix(location.prefix) for name in self.names if name.startswith(location.prefix)]


@dataclass(frozen=True, slots=True)
class _Repository:
    """The files of one commit, each in the cache or behind its address."""

    location: Location
    commit: str
    names: frozenset[str]

    def source(self, name: str) -> ByteSource:
        """Open a file by its name in the location."""
        from huggingface_hub import hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils._headers import build_hf_headers

        location, path = self.location, self.location.prefix + name
        if path not in self.names:
            text = f"the index names {name!r}, which the repository does not hold"
            help = "name another revision: hf://org/repo@rev"
            raise CheckpointError(Diagnostic("missing-shard", text, str(location), help=help))
        cached = try_to_load_from_cache(location.repo, path, revision=self.commit)
        if isinstance(cached, str):
            return LocalFile.of(cached, Path(cached).stat())
        url = hf_hub_url(location.repo, path, revision=self.commit)
        return HttpSource(f"{location}/{name}", build_hf_headers(), url)


def _fetched(
    location: Location, file: str | None, names: Sequence[str], by_file: bool, component: str | None
) -> tuple[str, list[Component]]:
    """The local folder of a checkpoint of the hub, downloaded as far as the cache does not hold it, and its parts."""
    if file is not None:
        parts = [Component("", "", Choice(index=file) if file.endswith(".json") else Choice(files=(file,)))]
    else:
        parts = _chosen(location, names, by_file, component)
    root = ""
    for part in parts:
        below = f"{location.prefix}{part.folder}/" if part.folder else location.prefix
        found = _download_all(Location(location.repo, location.revision, below.rstrip("/") or None), part.names)
        if part.choice.index:
            _fetch_shards(location, found, below)
        for name in config_names(part.names):
            if name == "config.json" or below + name in names:
                _fetch_config(location, below + name)
        folder = Path(found).parent
        root = str(folder.parents[part.folder.count("/")] if part.folder else folder)
    return root, parts


def _chosen(location: Location, everything: Sequence[str], by_file: bool, component: str | None) -> list[Component]:
    inside = [name.removeprefix(location.prefix) for name in everything if name.startswith(location.prefix)]
    names = list(dict.fromkeys(name.partition("/")[0] for name in inside))
    if by_file:
        return [Component("", "", all_of([name for name in names if name in set(inside)], str(location)))]

    def shards_of(index: str) -> set[str]:
        return set(weight_map_of(_download_all(location, [index]))[0].values())

    def below() -> list[str]:
        return [name for name in inside if name.count("/") == 1]

    folder = Folder(str(location), str(location), names, below, lambda name: f"{location}/{name}", shards_of)
    return parts_of(folder, lambda name: Path(_download_all(location, [name])).read_bytes(), component)


def _download_all(location: Location, files: Sequence[str]) -> str:
    """Download files of a location; the local path of the first."""
    paths = []
    for file in files:
        path = _download(location, location.prefix + file)
        if path is None:
            raise _no_file(Location(location.repo, location.revision, location.prefix + file))
        paths.append(path)
    return paths[0]


def _fetch_shards(location: Location, index: str, prefix: str) -> None:
    weight_map, _ = weight_map_of(index)
    missing = []
    for name in dict.fromkeys(weight_map.values()):
        if _download(location, prefix + name) is None:
            missing.append(name)
    if missing:
        text = f"the index names {counted(len(missing), 'shard')} that the repository does not hold"
        help = "name another revision: hf://org/repo@rev"
        raise CheckpointError(Diagnostic("missing-shard", text, str(location), notes=shown_keys(missing), help=help))


def _fetch_config(location: Location, file: str) -> None:
    """The configuration is wanted, not needed: without a connection the cached weights are enough."""
    from huggingface_hub import try_to_load_from_cache

    # Anything but None is an answer, "known not to exist" too, and saves a request with its retries.
    if try_to_load_from_cache(location.repo, file, revision=location.revision) is None:
        with suppress(CheckpointError):
            _download(location, file)


def _download(location: Location, file: str, needed: bool = True) -> str | None:
    """The local path of one file; None where the repository has no such file.

    A file that is not needed may be missing from the cache when anything else of the repository is in it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _explained(location, file):
        try:
            return hf_hub_download(location.repo, file, revision=location.revision)
        except LocalEntryNotFoundError as error:
            if (_offline() or not needed) and _anything_cached(location):
                return None  # offline the cache is the repository
            raise error
        except EntryNotFoundError:
            return None


def _listing(location: Location) -> _RepositoryNames:
    """All files of a repository; offline, or where the hub cannot be reached, those in the cache."""
    from huggingface_hub import HfApi, constants

    config = f"{location.prefix}config.json"
    if not _offline():
        try:
            # Asked first: unlike downloads, it is not tried again for half a minute where nothing answers.
            with _explained(location):
                revision = location.revision or constants.DEFAULT_REVISION
                found = HfApi().model_info(location.repo, revision=revision)
        except CheckpointError as error:
            if error.diagnostics[0].code != "hub-unreachable":
                _download(
                    location, config, needed=False
                )  # asked for a file, the hub is more precise: gated, no revision
                raise
            if _anything_cached(location) is None:
                raise
        else:
            _download(location, config, needed=False)
            return _RepositoryNames(sorted(file.rfilename for file in found.siblings or ()), found.sha)
    folder = _anything_cached(location)
    if folder is None:
        _download(location, config, needed=False)
        return _RepositoryNames([], None)
    found_here = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return _RepositoryNames(found_here, None)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _anything_cached(location: Location) -> Path | None:
    """The cached snapshot of a revision, if there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(location.repo, revision=location.revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None


def _no_file(location: Location) -> CheckpointError:
    names = [name for name in _listing(location).names if name.endswith((*SUFFIXES, ".index.json"))]
    where = "the cache of " if _offline() else ""
    text = f"{where}{location.repo!r} holds no file {location.inside!r}"
    return CheckpointError(
        Diagnostic("missing-file", text, str(location), notes=shown_keys(names, 10), help="name one of these files")
    )


@contextmanager
def _explained(location: Location, file: str | None = None) -> Iterator[None]:
    """Turns huggingface_hub's errors into diagnostics."""
    from huggingface_hub import constants, errors

    def refuse(code: str, text: str, help: str) -> CheckpointError:
        return CheckpointError(Diagnostic(code, text, str(location), help=help))

    what = f"{file!r} of {location.repo!r}" if file else repr(location.repo)
    unreachable = f"{what} is not in the cache, and {constants.ENDPOINT} cannot be reached"
    check = "check the connection, HF_ENDPOINT and the proxy settings"
    try:
        yield
    except errors.GatedRepoError as error:
        help = f"ask for access at {constants.ENDPOINT}/{location.repo}, then: hf auth login"
        raise refuse("gated-repository", f"{location.repo!r} is gated", help) from error
    except errors.RepositoryNotFoundError as error:
        help = "check the name; for a private repository: hf auth login"
        raise refuse("missing-repository", f"the hub has no repository {location.repo!r}, or hides it", help) from error
    except errors.RevisionNotFoundError as error:
        text = f"{location.repo!r} has no revision {location.revision!r}"
        raise refuse("missing-revision", text, "leave @rev out for the default branch") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if _offline():
            help = "unset HF_HUB_OFFLINE, or download it beforehand: hf download " + location.repo
            raise refuse("offline", f"{what} is not in the cache, and offline mode is on", help) from error
        raise refuse("hub-unreachable", unreachable, check) from error
    except errors.HFValidationError as error:
        help = "hf://org/repo, hf://org/repo@rev/file"
        raise refuse("bad-hub-path", f"{location.repo!r} is no repository's name", help) from error
    except Exception as error:
        # the client's own errors: which client that is depends on the version of huggingface_hub
        if any(base.__name__ in ("TransportError", "ConnectionError", "Timeout") for base in type(error).__mro__):
            raise refuse("hub-unreachable", unreachable, check) from error
        if not isinstance(error, OSError):
            raise
        text = f"{what} could not be downloaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise refuse("download-failed", text, "try again; what is complete stays in the cache") from error
