"""Output that appears whole or not at all: written beside its final name, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import CheckpointError, Diagnostic, Remedy
from ...wording import shown_bytes
from ..contents import Extent
from ..sources.files import Descriptors
from ..sources.kernel_copies import copy_range
from ..sources.system_errors import os_error
from .durability import SYNCED, Durability
from .reserving import reserve
from .transactions import MARK, Replacement, locked, remove_abandoned, stamp_of

__all__ = ["MARK", "FolderChange", "Output", "Writer", "beside", "new_tag"]

WEIGHTS = (".safetensors", ".safetensors.index.json")
_SEND_EVERY = 32 << 20
_AGAIN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_AT_ONCE = 1 << 20  # above this, file systems of today are erratic


def beside(path: Path, tag: str | None = None) -> Path:
    """A temporary name in the same folder that no reader takes for a checkpoint; a new one each time, but for a tag."""
    return path.with_name(f".{path.name[:120]}{MARK}{tag or new_tag()}")


def new_tag() -> str:
    """What tells the temporary files of one run from those of every other."""
    return f"{os.getpid()}-{os.urandom(4).hex()}"


@dataclass(frozen=True, slots=True)
class Output:
    """One file to come.

    Args:
        final: its name once everything is written.
        temporary: the file that is written until then.
        size: in bytes.
        head: the bytes at its start that are known already, such as a header.
        beside: whether it is none of the checkpoint's own files, such as a config that goes along.
        between: offset -> bytes that are known already and stand elsewhere, such as a header before each tensor.
    """

    final: Path
    temporary: Path
    size: int
    head: bytes | bytearray = b""
    beside: bool = False
    between: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class _UnsentSpan:
    """What was written to a file since the system was last told to begin with it."""

    start: int
    stop: int
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class FolderChange:
    """How a folder comes to hold what a writer writes, and no other checkpoint.

    Args:
        new: `(temporary, final)` when all outputs lie in a folder of their own that is renamed as a whole.
        set_aside: what must not be seen while the outputs take their names, such as an index of the files replaced.
        stale: files of the checkpoint replaced that are removed at the end.
    """

    new: tuple[Path, Path] | None = None
    set_aside: Sequence[Path] = ()
    stale: Sequence[Path] = ()


class Writer:
    """Takes tensors' bytes in any order, from any thread; leaving its context commits or aborts.

    `places` says for each key in which (temporary) file and at which offset its bytes go, `order` lists the keys in
    file order, `files` the names that the output will have, `nbytes` says how much is to be written in all.

    Args:
        outputs: the files, in the order in which they are to appear; the one that makes the others valid comes last.
        places: key -> where its bytes go.
        folder: what becomes of the folder, where the outputs are the checkpoint that it is to hold.
        durability: whether to wait until all of it is on the disk.

    Raises:
        CheckpointError: on entering and on writing: no permission, no space, and so on; nothing is left behind.
    """

    left_out: list[str]
    """Paths of extras that the format cannot hold; a writer that leaves none out does not have it."""

    def __init__(
        self,
        outputs: Sequence[Output],
        places: dict[str, Extent],
        folder: FolderChange | None = None,
        durability: Durability = SYNCED,
    ) -> None:
        self.places = places
        self.order = list(places)
        self.files = [str(output.final) for output in outputs if not output.beside]
        self._outputs = list(outputs)
        self._by_name = {str(output.temporary): output for output in outputs}
        change = folder or FolderChange()
        self._new_folder, self._set_aside, self._stale = change.new, list(change.set_aside), list(change.stale)
        self._durability = durability
        self._identities: dict[str, tuple[int, int]] = {}
        self._synced: set[str] = set()
        itself = weakref.ref(self)  # a cycle would keep the files open, and locked, until a collection
        self._descriptors = Descriptors(
            lambda path: itself()._open(path),  # type: ignore[union-attr]
            lambda path, number: itself()._sync_first(path, number),  # type: ignore[union-attr]
        )
        self._sizes = {str(output.temporary): output.size for output in outputs}
        self._made: list[Path] = []
        self.nbytes = self._awaited = sum(map(itemgetter(2), places.values()))
        self._whole_folder, self._decided, self._finished = folder is not None, False, False
        self._before = self._seen()
        self._lock = threading.Lock()
        # Threads that write to one file take turns in the system anyway, where they would wait by spinning.
        self._turns = {file: threading.Lock() for file in self._sizes}
        self._unsent: dict[str, _UnsentSpan] = {}

    def __enter__(self) -> Writer:
        with self._undone():
            self._create()
        return self

    def _create(self) -> None:
        folder = self._outputs[-1].temporary.parent
        finals = [output.final for output in reversed(self._outputs)]
        remove_abandoned([self._new_folder[1]] if self._new_folder else finals)
        for output in reversed(self._outputs):
            self._make_folders(output.temporary.parent)  # companions may lie in folders below
        needed, space = sum(self._sizes.values()) - self._allocated(), os.statvfs(folder)
        if space.f_blocks and needed > space.f_bavail * space.f_frsize:
            free = shown_bytes(space.f_bavail * space.f_frsize)
            text = f"the output takes {shown_bytes(needed)}, {free} are free"
            raise CheckpointError(
                Diagnostic(
                    "disk-full",
                    text,
                    str(self._outputs[0].final.parent),
                    help="free some space, or choose another folder; nothing was written",
                )
            )
        for output in self._outputs:
            name = str(output.temporary)
            with self._descriptors.using(name) as descriptor:
                os.ftruncate(descriptor, output.size)
                reserve(descriptor, output.size)
            self._pwrite(name, 0, memoryview(output.head))
            for offset, data in output.between.items():
                self._pwrite(name, offset, memoryview(data))

    def _open(self, name: str) -> int:
        """Begin an output, or open it again after it had to make room for others."""
        if self._descriptors.closed:
            raise OSError(errno.EBADF, "the output was given up", name)
        known = self._identities.get(name)
        try:
            descriptor = self._begin(self._by_name[name]) if known is None else os.open(name, _AGAIN)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._descriptors.make_room():
                return self._open(name)
            raise
        status = os.fstat(descriptor)
        found = status.st_dev, status.st_ino
        if known not in (None, found):
            os.close(descriptor)
            raise OSError(errno.ESTALE, "something else took the place of a file that is being written", name)
        self._identities[name] = found
        with contextlib.suppress(OSError):  # whoever finds no file of a run with a lock knows that its writer is gone
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor

    def _sync_first(self, name: str, descriptor: int) -> None:
        # Nobody would hear later of what the disk refused. Before the call: what is written meanwhile is synced again.
        self._synced.add(name)
        self._durability.keep(descriptor)

    def _make_folders(self, folder: Path) -> None:
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        for parent in reversed(missing):
            self._made.append(parent)  # before it is: Ctrl-C may come in between
            try:
                parent.mkdir()
            except OSError:
                self._made.pop()
                raise

    def _remove_folders(self) -> None:
        while self._made:
            with contextlib.suppress(OSError):
                self._made.pop().rmdir()  # refuses, rightly, where somebody else put something in

    def _allocated(self) -> int:
        """Bytes that the outputs take on the disk already."""
        return 0

    def _begin(self, output: Output) -> int:
        # Mode 0666 less the umask, as for any file that a program writes.
        return os.open(output.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def has(self, file: str, offset: int, nbytes: int) -> bool:
        """Whether a run of bytes need not be written, because an earlier run left it; then `skip` counts it."""
        return False

    def skip(self, nbytes: int) -> None:
        """Count bytes as written that are there already."""
        with self._lock:
            self._awaited -= nbytes

    def room(self, file: str, offset: int, nbytes: int) -> None:
        """What is written may lie anywhere: a file has no memory to make it in."""

    def adjoin(self, stop: int, offset: int) -> bool:
        """Whether what ends at one byte and what begins at the other may be written at once, and all between them."""
        return stop == offset

    def write(self, file: str, offset: int, data: Any) -> None:
        """Writes a buffer at an offset of one of the files that `places` names.

        Raises:
            CheckpointError: the disk is full, and the like.
        """
        view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        self._put(file, offset, view, len(view))

    def _put(self, file: str, offset: int, view: memoryview, owed: int) -> None:
        """Write a buffer of which so many bytes are the caller's to write."""
        if offset < 0 or offset + len(view) > self._sizes[file]:
            text = f"bytes {offset} to {offset + len(view)} lie outside of the file"
            raise CheckpointError(Diagnostic("write-out-of-range", text, file))
        try:
            self._pwrite(file, offset, view)
        except OSError as error:
            raise os_error(error, file, "write") from error
        self.skip(owed)
        self._send(file, offset, len(view))
        self._note(file, offset, len(view))

    def _send(self, file: str, offset: int, nbytes: int) -> None:
        """Have the disk begin with what was written, whenever that is enough to be worth a call."""
        with self._lock:
            span = self._unsent.setdefault(file, _UnsentSpan(offset, offset))
            span.start, span.stop = min(span.start, offset), max(span.stop, offset + nbytes)
            span.nbytes += nbytes
            if span.nbytes < _SEND_EVERY:
                return
            del self._unsent[file]
        with self._descriptors.using(file) as descriptor:
            self._durability.begin(descriptor, span.start, span.stop - span.start)

    def copy(self, file: str, offset: int, source: int, source_offset: int, nbytes: int) -> int:
        """Have the kernel copy bytes from another open file, or share its blocks; return how many it copied."""
        with self._descriptors.using(file) as descriptor, self._turns[file]:
            done = copy_range(source, source_offset, descriptor, offset, nbytes)
        self._synced.discard(file)
        if done:
            self.skip(done)
            self._send(file, offset, done)
            self._note(file, offset, done)
        return done

    def _note(self, file: str, offset: int, nbytes: int) -> None:
        """Hear of bytes that were written."""

    def _pwrite(self, file: str, offset: int, view: memoryview) -> None:
        held, done = self._descriptors.take(file), 0
        try:
            while done < len(view):
                with self._turns[file]:
                    count = os.pwrite(held.number, view[done : done + _AT_ONCE], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "the file system takes no more bytes and says no reason", file)
                done += count
        finally:
            held.give()
            self._synced.discard(file)

    @property
    def staged(self) -> tuple[str, dict[str, str]]:
        """The file to open for the output as it lies under temporary names, and path -> place of those it names."""
        places = {str(o.temporary.with_name(o.final.name)): str(o.temporary) for o in self._outputs}
        return str(self._outputs[-1].temporary), places

    def finish(self) -> None:
        """Makes the output durable under its temporary names, where it can be read back; a second call does nothing.

        Raises:
            CheckpointError: not every byte of every tensor was written, or the file system refuses.
        """
        if self._finished:
            return
        if self._awaited:
            self.abort()
            text = f"{self._awaited:,} bytes of the output were not written"
            raise CheckpointError(Diagnostic("incomplete-output", text, self.files[0]))
        with self._undone():
            self._complete()
            for name in [name for name in self._by_name if name not in self._synced]:
                with self._descriptors.using(name) as descriptor:
                    self._durability.keep(descriptor)
            for parent in self._made:
                self._durability.keep_names(parent.parent)
                self._durability.keep_names(parent)
        self._finished = True

    def _complete(self) -> None:
        """Write what can be written only when all else is."""

    def commit(self) -> None:
        """Makes the output durable and gives the files their names, the last one last.

        Raises:
            CheckpointError: not every byte of every tensor was written, or the file system refuses.
        """
        self.finish()
        with self._undone():
            self._appear()
            self._close()

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Whatever fails here leaves nothing; what the system refuses becomes an error with a remedy."""
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self.abort)
            try:
                yield
            except OSError as error:
                raise os_error(error, error.filename or self.files[0], "write") from error
            cleanup.pop_all()

    def discard(self) -> None:
        """Removes everything temporary, also what another run could go on from: for an output that is wrong."""
        self.abort()

    def _appear(self) -> None:
        folder = self._outputs[-1].final.parent
        if self._new_folder is not None:
            temporary, final = self._new_folder
            self._durability.keep_names(temporary)
            with locked(final.parent):
                self._refuse_changed()
                temporary.rename(final)
                self._durability.keep_names(final.parent)
            return
        with locked(folder):
            self._refuse_changed()
            unfinished = Replacement.read(folder)
            if unfinished is not None and not self._whole_folder:
                unfinished.carry_out()  # another run decided on it, and may have promised that it lasts
            if len(self._outputs) == 1 and not (self._set_aside or self._stale or (unfinished and self._whole_folder)):
                self._outputs[0].temporary.replace(self._outputs[0].final)
                self._durability.keep_names(folder)
                return
            replacement = Replacement(
                folder,
                tuple(str(path.relative_to(folder)) for path in self._set_aside),
                tuple(
                    (str(output.temporary.relative_to(folder)), str(output.final.relative_to(folder)))
                    for output in self._outputs
                ),
                tuple(str(path.relative_to(folder)) for path in self._stale),
            )
            with contextlib.ExitStack() as broken:
                # Ctrl-C may come between the call that decides and the word that it was made.
                broken.callback(self._ask_whether_decided, replacement)
                replacement.write(self._durability)
                broken.pop_all()
            self._decided = True
            replacement.carry_out(self._durability)

    def _ask_whether_decided(self, replacement: Replacement) -> None:
        try:
            self._decided = Replacement.read(replacement.folder) == replacement
        except (OSError, CheckpointError):
            self._decided = True  # what cannot be read may be ours

    def _seen(self) -> dict[str, tuple[int, ...] | None]:
        """What lies where the output is to appear."""
        if self._new_folder is not None:
            return {str(self._new_folder[1]): stamp_of(self._new_folder[1])}
        places = {*(output.final for output in self._outputs), *self._set_aside, *self._stale}
        if self._whole_folder:
            with contextlib.suppress(OSError):
                places |= {p for p in self._outputs[-1].final.parent.iterdir() if p.name.endswith(WEIGHTS)}
        return {str(path): stamp_of(path) for path in places}

    def _refuse_changed(self) -> None:
        now = self._seen()
        changed = sorted(p for p in {*now, *self._before} if now.get(p) != self._before.get(p))
        if changed:
            text = "something else wrote to the same place while this output was being written; it is left as it is"
            replaced = Remedy("overwrite", True, "replaces it")
            raise CheckpointError(
                Diagnostic(
                    "output-changed",
                    text,
                    changed[0],
                    tuple(changed[1:6]),
                    remedies=(replaced,),
                    advice="but look at it first: was the same run started twice?",
                )
            )

    def abort(self) -> None:
        """Removes everything temporary; a second call does nothing."""
        self._close()
        if self._decided:
            return  # the new files are the checkpoint now, whatever their names: a reader finds them by the record
        for output in self._outputs:
            with contextlib.suppress(OSError):
                output.temporary.unlink(missing_ok=True)
        self._remove_folders()

    def _close(self) -> None:
        self._descriptors.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()
