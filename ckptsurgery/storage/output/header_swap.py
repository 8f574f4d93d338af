"""A new header in an old safetensors file: the data stays where it is, the old header is saved beside it first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ...errors import CheckpointError, Diagnostic
from ...specs import TensorSpec
from ..formats.safetensors import CHANGING, read_safetensors
from ..metadata_records import declared
from ..sources.system_errors import os_error
from .durability import SYNCED
from .safetensors_writer import header_of

__all__ = ["backup_of", "fitted_header", "refuse_shared", "replace_header", "restore_header"]


def backup_of(path: Path) -> Path:
    """Where the old header of a file lies."""
    return path.with_name(f".{path.name}.header-backup")


def refuse_shared(path: Path) -> None:
    """A file that has other names is not changed in place: who reads it under them would be in for a surprise.

    Raises:
        CheckpointError: a symbolic link, such as the hub's cache is made of, a hard link, or no file.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise os_error(error, str(path)) from error
    linked = "a symbolic link" if path.is_symlink() else "one of several hard links" if status.st_nlink > 1 else None
    if linked or not path.is_file():
        raise CheckpointError(
            Diagnostic(
                "in-place-link" if linked else "in-place-file",
                f"{str(path)!r} is {linked or 'no file'}, so it is not changed in place",
                str(path),
                help="write a new file instead",
            )
        )


def fitted_header(
    path: Path, places: Mapping[str, tuple[TensorSpec, int]], metadata: Mapping[str, str], aliases: Mapping[str, str]
) -> bytes:
    """A header for the data of a file as it lies there, as long as the old one.

    Args:
        places: key -> spec and offset in the file.
        aliases: names that share the tensor of another.

    Raises:
        CheckpointError: the tensors do not fill the data from end to end, or their header is longer than the old one.
    """
    with _for(path, os.O_RDONLY) as descriptor:
        start = 8 + int.from_bytes(os.pread(descriptor, 8, 0), "little")
        size = os.fstat(descriptor).st_size
    order = sorted(places, key=lambda key: (places[key][1], places[key][0].nbytes))
    end = start
    for key in order:
        spec, offset = places[key]
        if offset != end:
            between = f"{offset - end:,} bytes before {key!r} would belong to no tensor"
            raise _unfit("in-place-holes", between if offset > end else f"{key!r} overlaps another tensor", path)
        end += spec.nbytes
    if end != size:
        raise _unfit("in-place-holes", f"the last {size - end:,} bytes would belong to no tensor", path)
    header = header_of({key: places[key][0] for key in order}, declared(metadata, aliases, places))
    if len(header) > start:
        room = f"the new header takes {len(header):,} bytes, and there is room for {start:,}"
        raise _unfit("in-place-room", room, path)
    return (start - 8).to_bytes(8, "little") + bytes(header[8:]).ljust(start - 8)


def replace_header(path: Path, header: bytes, places: Mapping[str, tuple[TensorSpec, int]]) -> Path:
    """Write a header of the old one's length over it, and read it back; where the old one is now.

    Its copy is on the disk before the first byte changes. Memory that others have mapped of the data stays as it is.

    Args:
        places: key -> spec and offset in the file, which the new header must say.

    Raises:
        CheckpointError: the file cannot be written, or does not say what it should; the old header is put back.
    """
    refuse_shared(path)
    backup = backup_of(path)
    with _for(path, os.O_RDWR) as descriptor:
        old = os.pread(descriptor, len(header), 0)
        if len(old) < len(header) or old[:8] != header[:8]:
            raise _unfit("file-changed", "the file changed after its header was read", path)
        with contextlib.ExitStack() as undone:
            undone.callback(backup.unlink, missing_ok=True)
            _save(backup, old)
            undone.callback(_overwrite, descriptor, old)
            _overwrite(descriptor, header)
            entries = read_safetensors(str(path)).entries
            if any(key not in entries or (entries[key].spec, entries[key].offset) != places[key] for key in places):
                raise _unfit("in-place-check", "the header reads otherwise than it was written", path)
            undone.pop_all()
    return backup


def restore_header(path: str | os.PathLike[str]) -> None:
    """Put the header back that a file had before it was changed in place.

    >>> import tempfile, torch, ckptsurgery as cs
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = folder + "/m.safetensors"
    ...     _ = cs.save({"old.w": torch.ones(2)}, file)
    ...     _ = cs.plan(file, "old.w -> w").save(file, in_place=True)
    ...     changed = list(cs.open(file))
    ...     restore_header(file)
    ...     changed, list(cs.open(file))
    (['w'], ['old.w'])

    Raises:
        CheckpointError: there is no backup, or it is not of this file.
    """
    file = Path(path).expanduser()
    refuse_shared(file)
    backup = backup_of(file)
    if file.exists() and not backup.exists():
        text = "there is no header to put back: none was saved beside it, or it was put back already"
        help = f"a change in place saves it as {backup.name!r}"
        raise CheckpointError(Diagnostic("missing-file", text, str(file), help=help))
    with _for(backup, os.O_RDONLY) as kept, _for(file, os.O_RDWR) as descriptor:
        old = os.pread(kept, os.fstat(kept).st_size, 0)
        now = os.pread(descriptor, len(old), 0)
        # A crash may have torn the header, never its length: it is the same before and after.
        if len(old) < 8 or int.from_bytes(old[:8], "little") != len(old) - 8 or now[:8] != old[:8]:
            raise _unfit("in-place-backup", f"{str(backup)!r} is not the header of this file", file)
        with contextlib.ExitStack() as undone:
            undone.callback(_overwrite, descriptor, now)
            _overwrite(descriptor, old)
            read_safetensors(str(file))
            undone.pop_all()
        backup.unlink()


def _overwrite(descriptor: int, header: bytes) -> None:
    """Write a header over one of its length; a crash on the way leaves none, and never a mixture of the two.

    The first byte goes, which is a matter of one sector, and comes back when all others are on the disk.
    """
    for data, at in ((CHANGING, 8), (header[9:], 9), (header[8:9], 8)):
        _write(descriptor, data, at)
        os.fsync(descriptor)


def _write(descriptor: int, data: bytes, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)


def _save(backup: Path, header: bytes) -> None:
    temporary = backup.with_name(backup.name + ".new")
    with contextlib.ExitStack() as undone:
        undone.callback(temporary.unlink, missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _write(descriptor, header, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(backup)
        undone.pop_all()
    SYNCED.keep_names(backup.parent)


@contextmanager
def _for(path: Path, flags: int) -> Iterator[int]:
    """The open file; for writing, with a lock that a second process does not get."""
    import fcntl

    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise os_error(error, str(path), "write" if flags & os.O_RDWR else "read") from error
    try:
        if flags & os.O_RDWR:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError:
        raise _unfit("output-busy", "another process is changing this file", path) from None
    except OSError as error:
        raise os_error(error, str(path), "write") from error
    finally:
        os.close(descriptor)


def _unfit(code: str, text: str, path: Path) -> CheckpointError:
    return CheckpointError(
        Diagnostic(code, f"not changed in place: {text}", str(path), help="write a new file instead")
    )
