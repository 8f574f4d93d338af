"""Outputs at addresses: written to a local folder, uploaded without taking their names, then named one by one.

In stores of fsspec a file is written first and gets its name by a second call (`autocommit=False`, then `commit` or
`discard`). In S3 the first is a multipart upload that is not completed. So no file is visible before every byte is in
the store, the file that makes the others valid is named last, and a failure leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, Diagnostic, Remedy
from ..sources.fsspec_source import file_system
from ..sources.system_errors import os_error

__all__ = ["RemoteOutput", "is_address"]

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_READ_ONLY = ("http", "https", "hf")
_AT_ONCE = 4
_PART = 16 << 20
_MOST_PARTS = 9_000  # S3 takes 10,000 of a file
_LAST = ("index.json", ".metadata")


def is_address(path: str) -> bool:
    """Return whether an output is at an address.

    >>> is_address("s3://bucket/x"), is_address("folder/x")
    (True, False)
    """
    return _ADDRESS.match(path) is not None


@dataclass(frozen=True, slots=True)
class RemoteOutput:
    """A place for an output in a store.

    Args:
        address: as the caller gave it.
        system: the file system of fsspec, which nobody else uses.
        path: the path in it.
    """

    address: str
    system: Any
    path: str

    @classmethod
    def at(cls, address: str) -> RemoteOutput:
        """Return the place at an address.

        Raises:
            CheckpointError: it cannot be written, or no installed package opens it.
        """
        if address.partition("://")[0].lower() in _READ_ONLY:
            raise CheckpointError(_unwritten(address, f"{address!r} is an address that files are not written to"))
        system, path = file_system(address, own=True)
        return cls(address, system, path.rstrip("/"))

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rstrip("/").rpartition("/")[2]

    def refuse_existing(self, folder: bool, overwrite: bool) -> None:
        """Refuse what is there already.

        Raises:
            CheckpointError: there is something, and it is not to be replaced, or cannot be replaced as a whole.
        """
        with self._reported():
            self.system.invalidate_cache()
            exists = bool(self.system.find(self.path)) if folder else self.system.exists(self.path)
        if exists and not overwrite:
            replaced, elsewhere = Remedy("overwrite", True, "replaces it"), "or choose another place"
            text = f"{self.address!r} exists"
            remedies = () if folder else (replaced,)
            advice = self._removal() if folder else elsewhere
            raise CheckpointError(Diagnostic("output-exists", text, self.address, remedies=remedies, advice=advice))
        if exists and folder:
            text = "a store cannot replace the files of a folder as one, and half of each is not a checkpoint"
            raise CheckpointError(Diagnostic("output-exists", text, self.address, help=self._removal()))

    def _removal(self) -> str:
        return (
            f"choose another folder, or remove it first: fsspec.url_to_fs({self.address!r})[0].rm({self.path!r}, True)"
        )

    def upload(self, local: Path) -> tuple[str, ...]:
        """Upload a file, or the files of a folder, and return their addresses.

        Raises:
            CheckpointError: the store refuses something; then it holds what it held before.
        """
        names = sorted((p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()), key=_order)
        pairs = [(local / name, f"{self.path}/{name}") for name in names] or [(local, self.path)]
        with self._reported():
            self.system.start_transaction()
            with contextlib.ExitStack() as undone:
                undone.callback(self.system.end_transaction)
                undone.callback(self.system.transaction.files.clear)
                begun: list[Any] = []
                undone.callback(_each, begun, lambda file: file.discard())
                with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ckptsurgery") as pool:
                    files = list(pool.map(lambda pair: self._send(pair[0], pair[1], begun), pairs))
                self._name(pairs, files, bool(names))
                begun.clear()
        base = self.address.rstrip("/")
        return tuple(f"{base}/{name}" for name in names) or (self.address,)

    def _send(self, local: Path, path: str, begun: list[Any]) -> Any:
        """Upload a file that does not take its name yet."""
        size = max(_PART, local.stat().st_size // _MOST_PARTS)
        file = self.system.open(path, "wb", block_size=size)
        if not _defers(file):
            scheme = self.address.partition("://")[0]
            text = f"{scheme} files appear while they are written, so an interrupted upload would leave half of them"
            raise CheckpointError(_unwritten(self.address, text))
        begun.append(file)
        with local.open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
        file.close()
        return file

    def _name(self, pairs: Sequence[tuple[Path, str]], files: Sequence[Any], new: bool) -> None:
        """Give the files their names, the one that makes the others valid last."""
        with contextlib.ExitStack() as undone:
            named: list[str] = []
            undone.callback(_each, named, self.system.rm_file)
            for (local, path), file in zip(pairs, files):
                named += [path] if new else []
                file.commit()
                self.system.invalidate_cache()
                held = self.system.info(path)["size"]
                if held != local.stat().st_size:
                    raise OSError(errno.EIO, f"the store holds {held:,} bytes of {local.stat().st_size:,}", path)
            undone.pop_all()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except OSError as error:
            raise os_error(error, self.address, "write") from error
        except Exception as error:  # clients of stores have exceptions of their own
            raise os_error(OSError(errno.EIO, f"{type(error).__name__}: {error}"), self.address, "write") from error


def _each(items: Sequence[Any], undo: Callable[[Any], object]) -> None:
    """Undo each; the error that is being raised is the one to report."""
    for item in items:
        with contextlib.suppress(Exception):
            undo(item)


def _order(name: str) -> tuple[bool, str]:
    return name.endswith(_LAST), name


def _defers(file: Any) -> bool:
    """Whether a file gets its name by a call of its own, `commit`."""
    from fsspec.spec import AbstractBufferedFile  # type: ignore[import-untyped]

    kind = type(file)
    return all(
        getattr(kind, name, None) not in (None, getattr(AbstractBufferedFile, name)) for name in ("commit", "discard")
    )


def _unwritten(address: str, text: str) -> Diagnostic:
    """The diagnostic for an address that is not written, with a local output and the line that uploads it."""
    scheme, _, inside = address.partition("://")
    name = inside.rstrip("/").rpartition("/")[2] or "out"
    meant = Remedy("path", name, "is a local one")
    repository = "/".join(inside.split("@")[0].split("/")[:2])
    python = f"import fsspec; fsspec.filesystem({scheme!r}).put({name!r}, {address!r}, recursive=True)"
    upload = f"hf upload {repository} {name}" if scheme == "hf" else python
    advice = "then upload it" if scheme.lower() in ("http", "https") else f"then upload it: {upload}"
    return Diagnostic("unsupported-output", text, address, remedies=(meant,), advice=advice)
