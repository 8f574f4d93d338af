"""Repositories of the hub: which files are needed, fetched through huggingface_hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError, Diagnostic
from ...wording import counted, shown_keys
from ..formats.index_json import weight_map_of
from .choosing import SUFFIXES, Choice, Folder, choose
from .folders import all_of

__all__ = ["Location", "fetch"]

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
        return self.inside is not None and self.inside.endswith((*SUFFIXES, ".json"))


def fetch(text: str, by_file: bool = False) -> tuple[str, Choice]:
    """The local folder of a checkpoint of the hub, and which files of it are the checkpoint.

    The files are chosen among the names in the repository as they are in a folder (see `choosing`), and downloaded
    where the cache does not hold them; `config.json` comes along. `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and the
    token work as for every user of huggingface_hub.

    Raises:
        CheckpointError: no such repository, revision or file; no access; offline and not in the cache; several
            checkpoints.
    """
    location = Location.parse(text)
    if location.names_file:
        folder, _, file = f"/{location.inside}".rpartition("/")
        location = Location(location.repo, location.revision, folder[1:] or None)
        chosen = Choice(index=file) if file.endswith(".json") else Choice(files=(file,))
    else:
        chosen = _chosen(location, by_file)
    found = _download_all(location, [chosen.index] if chosen.index else chosen.files)
    if chosen.index:
        _fetch_shards(location, found, location.prefix)
    _fetch_config(location, f"{location.prefix}config.json")
    return str(Path(found).parent), chosen


def _chosen(location: Location, by_file: bool) -> Choice:
    everything = _names(location)
    inside = [name.removeprefix(location.prefix) for name in everything if name.startswith(location.prefix)]
    names = list(dict.fromkeys(name.partition("/")[0] for name in inside))
    if by_file:
        return all_of([name for name in names if name in set(inside)], str(location))

    def shards_of(index: str) -> set[str]:
        return set(weight_map_of(_download_all(location, [index]))[0].values())

    def below() -> list[str]:
        return [name for name in inside if name.count("/") == 1]

    return choose(Folder(str(location), str(location), names, below, lambda name: f"{location}/{name}", shards_of))


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


def _names(location: Location) -> list[str]:
    """All files of a repository; offline, or where the hub cannot be reached, those in the cache."""
    from huggingface_hub import HfApi, constants

    # Wanted anyway, and asked for a file the hub says more precisely what is wrong: gated, no such revision.
    _download(location, f"{location.prefix}config.json", needed=False)
    try:
        if not _offline():
            with _explained(location):
                revision = location.revision or constants.DEFAULT_REVISION
                found = HfApi().model_info(location.repo, revision=revision)
            return sorted(file.rfilename for file in found.siblings or ())
    except CheckpointError as error:
        if error.diagnostics[0].code != "hub-unreachable" or _anything_cached(location) is None:
            raise
    folder = _anything_cached(location)
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) if folder else []


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
    names = [name for name in _names(location) if name.endswith((*SUFFIXES, ".index.json"))]
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
