"""Files of object stores and of everything else that fsspec knows: `s3://`, `gs://`, `abfs://`, `memory://`, …"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import CheckpointError, Diagnostic
from .byte_source import changed
from .remote import FIRST, Facts, Interrupted, RemoteSource

__all__ = ["FsspecSource", "file_system", "unreachable"]

_MARKS = ("ETag", "etag", "version_id", "generation", "md5Hash", "content_md5", "LastModified", "mtime", "created")


def file_system(address: str, own: bool = False) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path in it.

    Args:
        own: whether nobody else gets the same object.

    Raises:
        CheckpointError: fsspec does not know the scheme, or a package for it is missing.
    """
    import fsspec  # type: ignore[import-untyped]

    try:
        return fsspec.url_to_fs(address, skip_instance_cache=own)  # type: ignore[no-any-return]
    except ImportError as error:
        text = f"{address!r} needs a package that is not installed: {error}"
        scheme = address.partition("://")[0]
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
        help = f"pip install {package.get(scheme, 'fsspec[full]')}"
        raise CheckpointError(Diagnostic("address", text, address, help=help)) from error
    except (ValueError, OSError) as error:
        text = f"{address!r} is an address that fsspec does not open: {error}"
        raise CheckpointError(Diagnostic("address", text, address, help="download the file, and open that")) from error


def unreachable(address: str, error: Exception) -> CheckpointError:
    """Return the error for a store that its client does not reach."""
    text = f"{address!r} cannot be reached: {str(error) or type(error).__name__}"
    help = "check the credentials and the connection"
    return CheckpointError(Diagnostic("download-failed", text, address, help=help))


class FsspecSource(RemoteSource):
    """A file of a file system of fsspec.

    Args:
        name: the address.
        system: the file system.
        path: the path in it.
    """

    def __init__(self, name: str, system: Any, path: str) -> None:
        self._system, self._path = system, path
        super().__init__(name)

    def beside(self, name: str) -> FsspecSource:
        """Return a file in the same folder, or below it."""
        address, path = (f"{whole.rpartition('/')[0]}/{name}" for whole in (self.name, self._path))
        return FsspecSource(address, self._system, path)

    def probe(self) -> tuple[Facts, bytes]:
        """Ask for the file's facts, then for its first bytes."""
        facts = self._facts()
        return facts, b"".join(self._blocks(0, min(FIRST, facts.size)))

    def stream(self, offset: int, nbytes: int) -> Iterator[bytes]:
        """Yield the bytes at once."""
        if self._facts() != Facts(self.size, self.identity):
            raise changed(self.name)
        yield from self._blocks(offset, nbytes)

    def _blocks(self, offset: int, nbytes: int) -> Iterator[bytes]:
        try:
            if nbytes:
                yield self._system.cat_file(self._path, start=offset, end=offset + nbytes)
        except FileNotFoundError:
            raise self._missing() from None
        except OSError as error:
            raise Interrupted(str(error)) from error
        except Exception as error:  # the clients of stores have errors of their own, such as for missing credentials
            raise unreachable(self.name, error) from error

    def _facts(self) -> Facts:
        try:
            self._system.invalidate_cache(self._path)
            found: Mapping[str, Any] = self._system.info(self._path)
        except FileNotFoundError:
            raise self._missing() from None
        except PermissionError as error:
            text, help = f"no permission to read {self.name!r}: {error}", "check the credentials of this machine"
            raise CheckpointError(Diagnostic("permission-denied", text, self.name, help=help)) from error
        except OSError as error:
            raise Interrupted(str(error)) from error
        except Exception as error:
            raise unreachable(self.name, error) from error
        size = found.get("size")
        if type(size) is not int:
            text = f"{self.name!r} is not a file whose size is known"
            raise CheckpointError(Diagnostic("not-a-file", text, self.name, help="name a file"))
        return Facts(size, (*(str(found[mark]) for mark in _MARKS if mark in found), size))

    def _missing(self) -> CheckpointError:
        text, help = f"there is no file at {self.name!r}", "check the address"
        return CheckpointError(Diagnostic("missing-file", text, self.name, help=help))
