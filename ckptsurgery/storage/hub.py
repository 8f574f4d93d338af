"""Repositories of the hub: which files are needed, fetched through huggingface_hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, Diagnostic, Remedy
from ..narrowing import present
from ..wording import counted
from .index_json import weight_map_of
from .text import shown_keys

__all__ = ["Location", "fetch"]

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pdparams")
_USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
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
    def names_file(self) -> bool:
        """Whether the part inside of the repository is a file, judged by its suffix."""
        return self.inside is not None and self.inside.endswith((*_SUFFIXES, ".json"))


def fetch(text: str, by_file: bool = False) -> str:
    """The local path of a checkpoint of the hub, downloaded if the cache does not hold it; `config.json` comes along.

    `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and the token work as for every user of huggingface_hub.

    Raises:
        CheckpointError: no such repository, revision or file; no access; offline and not in the cache.
    """
    location = Location.parse(text)
    if by_file:
        return _fetch_folder(location)
    if location.names_file:
        found = _download(location, present(location.inside, "the path of a file of the hub"))
        if found is None:
            raise _no_file(location)
    else:
        found = _usual_file(location) or _only_file(location)
    inside = location.inside if not location.names_file else (location.inside or "").rpartition("/")[0]
    prefix = f"{inside}/" if inside else ""
    if found.endswith(".index.json"):
        _fetch_shards(location, found, prefix)
    _fetch_config(location, f"{prefix}config.json")
    return found


def _usual_file(location: Location) -> str | None:
    prefix = f"{location.inside}/" if location.inside else ""
    for name in _USUAL:
        found = _download(location, prefix + name)
        if found is not None:
            return found
    return None


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


def _only_file(location: Location) -> str:
    """The one checkpoint of a repository that has an unusual name."""
    prefix = f"{location.inside}/" if location.inside else ""
    names = _names(location)
    here = [n for n in names if n.startswith(prefix) and "/" not in n[len(prefix) :]]
    indices = [n for n in here if n.endswith(tuple(f"{suffix}.index.json" for suffix in _SUFFIXES))]
    for found in (indices, [n for n in here if n.endswith(".safetensors")], [n for n in here if n.endswith(_SUFFIXES)]):
        if len(found) == 1:
            path = _download(location, found[0])
            if path is not None:
                return path
        if found:
            break
    weights = [n for n in names if n.endswith(_SUFFIXES)]
    if not weights:
        notes = tuple(f"there is {n}" for n in shown_keys(here or names, 10))
        text = f"{location} holds no checkpoint"
        raise CheckpointError(Diagnostic("nothing-to-read", text, str(location), notes=notes, help="name the file"))
    base = Location(location.repo, location.revision, weights[0])
    text = f"{location} holds several checkpoints, and none of the usual name"
    raise CheckpointError(
        Diagnostic(
            "ambiguous-folder",
            text,
            str(location),
            shown_keys(weights, 12),
            remedies=(Remedy("source", str(base), "names one"),),
        )
    )


def _fetch_folder(location: Location) -> str:
    from huggingface_hub import snapshot_download

    prefix = f"{location.inside}/" if location.inside else ""
    patterns = [f"{prefix}*{suffix}" for suffix in _SUFFIXES] + [f"{prefix}config.json"]
    with _explained(location):
        root = snapshot_download(location.repo, revision=location.revision, allow_patterns=patterns)
    return str(Path(root, prefix))


def _download(location: Location, file: str) -> str | None:
    """The local path of one file; None where the repository has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _explained(location, file):
        try:
            return hf_hub_download(location.repo, file, revision=location.revision)
        except LocalEntryNotFoundError as error:
            if _offline() and _anything_cached(location):
                return None  # offline the cache is the repository
            raise error
        except EntryNotFoundError:
            return None


def _names(location: Location) -> list[str]:
    from huggingface_hub import HfApi

    if _offline():
        folder = _anything_cached(location)
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] if folder else []
        return sorted(files)
    with _explained(location):
        return sorted(HfApi().list_repo_files(location.repo, revision=location.revision))


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
    names = [name for name in _names(location) if name.endswith((*_SUFFIXES, ".index.json"))]
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
        cause = f"{constants.ENDPOINT} cannot be reached"
        help = "check the connection, HF_ENDPOINT and the proxy settings"
        raise refuse("hub-unreachable", f"{what} is not in the cache, and {cause}", help) from error
    except errors.HFValidationError as error:
        help = "hf://org/repo, hf://org/repo@rev/file"
        raise refuse("bad-hub-path", f"{location.repo!r} is no repository's name", help) from error
    except OSError as error:
        text = f"{what} could not be downloaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise refuse("download-failed", text, "try again; what is complete stays in the cache") from error
