"""Faults in the file layer: a stand-in for each system call that changes something, which strikes at one of them.

`Faults` is a context: while it lasts, the calls of `os` go through it. It can kill the process, raise what a full disk,
a failing one, a signal or Ctrl-C would, write half, or cut the power: then all is lost that nobody had synced.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["CALLS", "DEADLY", "Disk", "Faults", "Struck", "kinds_for", "watch"]

CALLS = ("pwrite", "copy_file_range", "sendfile", "write", "open", "ftruncate",
         "fsync", "fdatasync", "mkdir", "rename", "replace", "unlink", "rmdir",
         "link", "symlink", "truncate", "chmod", "utime")  # fmt: skip
DEADLY = ("kill", "half, then kill", "power", "torn power")
_AUDITED = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


class Struck(KeyboardInterrupt):
    """Ctrl-C, at a moment of the harness's choosing."""


def kinds_for(call: str) -> tuple[str, ...]:
    """The faults that a system call can meet."""
    common = ("kill", "power", "torn power", "ENOSPC", "EIO", "EINTR", "Ctrl-C", "late Ctrl-C")
    return (*common, "short", "half, then kill") if call in _MOVES else common


_MOVES = ("pwrite", "write", "copy_file_range", "sendfile")


def _run_of(name: str, args: tuple[Any, ...]) -> tuple[int, int | None, int]:
    """The file that a call writes to, from which byte (None: its end), and how many bytes."""
    if name == "copy_file_range":
        return args[1], args[4], args[2]
    if name == "sendfile":
        return args[0], os.lseek(args[0], 0, os.SEEK_CUR), args[3]
    return args[0], args[2] if len(args) > 2 else None, len(args[1])


def _half(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call that moves half of the bytes."""
    if name == "copy_file_range":
        return (*args[:2], max(1, args[2] // 2), *args[3:])
    if name == "sendfile":
        return (*args[:3], max(1, args[3] // 2))
    return (args[0], memoryview(args[1])[: max(1, len(args[1]) // 2)], *args[2:])


@dataclass
class Disk:
    """What a disk has not been told to keep yet.

    Args:
        grave: a folder on the same file system where files live on that were removed or replaced.
        names: changes of names that no sync of their folder followed, in order.
        writes: file number -> (offset, what was there before) of writes that no sync of the file followed.
    """

    grave: Path
    names: list[tuple[str, ...]] = field(default_factory=list)
    writes: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    buried: int = 0

    def before(self, name: str, args: tuple[Any, ...]) -> Callable[[], None]:
        """Remember what a call destroys; what is given back is to be called when the call is done."""
        if name in _MOVES:
            return self._written(*_run_of(name, args))
        if name in ("fsync", "fdatasync"):
            return lambda: self._synced(args[0])
        if name in ("rename", "replace"):
            change = ("renamed", str(args[0]), str(args[1]), self._bury(args[1]))
        elif name in ("unlink", "rmdir"):
            change = ("removed", str(args[0]), "", self._bury(args[0]))
        elif name == "mkdir" or (name == "open" and not os.path.lexists(args[0])):
            change = ("made", str(args[0]), "", "")
        else:
            return lambda: None
        return lambda: self.names.append(change)

    def _written(self, descriptor: int, at: int | None, size: int) -> Callable[[], None]:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            at = status.st_size if at is None else at
            # A second descriptor: this one may be for writing alone.
            with Path(f"/proc/self/fd/{descriptor}").open("rb", buffering=0) as file:
                old = os.pread(file.fileno(), size, at).ljust(size, b"\0")
            self.writes.setdefault(status.st_ino, []).append((at, old))
        return lambda: None

    def _synced(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if not stat.S_ISDIR(status.st_mode):
            self.writes.pop(status.st_ino, None)
            return
        folder = os.path.realpath(f"/proc/self/fd/{descriptor}")
        self.names = [c for c in self.names if folder not in {os.path.dirname(path) for path in c[1:3] if path}]  # noqa: PTH120

    def _bury(self, path: Any) -> str:
        if not os.path.lexists(path) or Path(path).is_dir():
            return ""
        self.buried += 1
        kept = str(self.grave / str(self.buried))
        _LINK(path, kept)
        return kept

    def told(self) -> dict[str, Any]:
        """All of it as plain data."""
        writes = {str(inode): [[at, old.hex()] for at, old in runs] for inode, runs in self.writes.items()}
        return {"names": self.names, "writes": writes}


_LINK = os.link


def lose(told: dict[str, Any], folder: Path, names_too: bool) -> None:
    """Do to a folder what a power cut does: undo what was not synced, or half of each write and no name.

    Args:
        told: by the process that died.
        names_too: lose all writes whole, and all changes of names; else the second half of each write alone.
    """
    files = {path.stat().st_ino: path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    files |= {path.stat().st_ino: path for path in (folder.parent / "grave").iterdir()}
    for inode, runs in told["writes"].items():
        path = files.get(int(inode))
        if path is None:
            continue
        with path.open("r+b") as file:
            for at, old in reversed(runs):
                data = bytes.fromhex(old)
                kept = 0 if names_too else len(data) // 2
                file.seek(at + kept)
                file.write(data[kept:])
    for what, a, b, kept in reversed(told["names"]) if names_too else ():
        if what == "made" and os.path.lexists(a):
            Path(a).rmdir() if Path(a).is_dir() else Path(a).unlink()
        elif what == "renamed" and os.path.lexists(b):
            Path(b).rename(a)
        if what in ("renamed", "removed") and kept:
            _LINK(kept, b or a)
        elif what == "removed" and not kept:
            Path(a).mkdir()


class Faults:
    """Stands in front of the system calls, counts them, and strikes at one.

    Args:
        kind: one of those that `kinds_for` names; "" only counts.
        at: the number of the call, from 1.
        disk: takes notes for a power cut.
        report: where a process that dies writes what its disk had not kept.
    """

    def __init__(self, kind: str = "", at: int = -1, disk: Disk | None = None, report: int | None = None) -> None:
        self.kind, self.at, self.disk, self.report = kind, at, disk, report
        self.log: list[str] = []
        self.written = 0  # bytes of files, journals apart
        self.inside = False
        self._real = {name: getattr(os, name) for name in CALLS}

    def __enter__(self) -> Faults:
        for name, call in self._real.items():
            setattr(os, name, self._wrapped(name, call))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, call in self._real.items():
            setattr(os, name, call)

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **options: Any) -> Any:
            if name == "open" and not (len(args) > 1 and args[1] & os.O_CREAT):
                return call(*args, **options)
            self.log.append(name)
            if len(self.log) == self.at:
                args = self._strike(name, args)
            after = self.disk.before(name, args) if self.disk else lambda: None
            self.inside = True
            try:
                result = call(*args, **options)
            finally:
                self.inside = False
            if len(self.log) == self.at and self.kind == "half, then kill":
                self.die()
            after()
            self.written += result if name in _MOVES[:1] + _MOVES[2:] else 0
            if len(self.log) == self.at and self.kind == "late Ctrl-C":
                raise Struck
            return result

        return faulty

    def _strike(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What happens instead of the call, or the arguments that it is made with."""
        if self.kind in ("kill", "power", "torn power"):
            self.die()
        if self.kind == "Ctrl-C":
            raise Struck
        if name in _MOVES and self.kind in ("short", "half, then kill"):
            return _half(name, args)
        if self.kind in ("short", "half, then kill", "late Ctrl-C"):
            return args
        raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))

    def die(self) -> None:
        """Be killed, after a last word on what would be lost with the power."""
        if self.report is not None and self.disk is not None:
            data = json.dumps(self.disk.told()).encode()
            while data:
                data = data[self._real["write"](self.report, data) :]
        os.kill(os.getpid(), signal.SIGKILL)


def watch(faults: Faults) -> list[str]:
    """From here on, to the end of the process: changes of files that do not go through the stand-ins."""
    unseen: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        makes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_CREAT | os.O_TRUNC)
        if (makes or event in _AUDITED) and not faults.inside:
            unseen.append(f"{event} {args[0]}")

    sys.addaudithook(hook)
    return unseen
