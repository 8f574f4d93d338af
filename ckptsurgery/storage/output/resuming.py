"""Output that an interrupted run leaves for the next one: the same temporary names, and a journal of what is on disk.

The journal lies beside the output. Its first line tells what the run is about, each further line a run of bytes that
was synced to the disk before the line was written; so after a crash it may say too little, and never too much.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from ...errors import CheckpointError, Diagnostic
from ...narrowing import present
from ..contents import Extent
from ..sources.system_errors import os_error
from .staging import MARK, FolderChange, Output, Writer, beside

__all__ = ["Journal", "ResumableWriter"]

_SUFFIX = ".journal"
_SYNC_EVERY = 256 << 20


class Journal:
    """Runs of bytes that are safely in the unfinished files of one output.

    Args:
        path: the output's final name.
        tag: tells this run's inputs and rules from all others.
    """

    def __init__(self, path: Path, tag: str) -> None:
        self.path = beside(path, tag).with_name(beside(path, tag).name + _SUFFIX)
        self._head = f"ckptsurgery journal 1 {tag}"
        self._descriptor: int | None = None

    def open(self) -> list[tuple[int, int, int]]:
        """Take hold of the journal; what it says as `(file number, start, stop)`.

        Raises:
            CheckpointError: another process is writing the same output.
        """
        import fcntl

        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise CheckpointError(
                Diagnostic("output-busy", "another process is writing this output", str(self.path), help="wait for it")
            ) from None
        with contextlib.ExitStack() as undone:
            undone.callback(self.close)
            found = self._said()
            undone.pop_all()
        return found

    def _said(self) -> list[tuple[int, int, int]]:
        """What the journal says; where it says nothing yet, its first line is written."""
        head, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        if head != self._head:
            with contextlib.ExitStack() as undone:
                undone.callback(self.remove)
                os.ftruncate(present(self._descriptor, "the open journal"), 0)
                self._append(self._head + "\n")
                undone.pop_all()
            return []
        # The last line may have been cut off in its middle; every whole one ends in a newline.
        whole = (line.split(" ") for line in lines[:-1])
        found = [(int(w[0]), int(w[1]), int(w[2])) for w in whole if len(w) == 3 and all(n.isdigit() for n in w)]
        if lines and lines[-1]:
            self._append("\n")
        return found

    def record(self, runs: Sequence[tuple[int, int, int]]) -> None:
        """Add runs that were synced."""
        self._append("".join(f"{number} {start} {stop}\n" for number, start, stop in runs))

    def _append(self, text: str) -> None:
        descriptor = present(self._descriptor, "the open journal")
        view = memoryview(text.encode())
        while view:
            view = view[os.write(descriptor, view) :]
        os.fdatasync(descriptor)

    def close(self) -> None:
        """Let go of it; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """The output is complete, or nothing of it is there."""
        self.path.unlink(missing_ok=True)
        self.close()

    def others(self) -> list[str]:
        """Journals of the same output that other runs left."""
        stem = self.path.name.partition(MARK)[0] + MARK
        names = (path.name for path in self.path.parent.iterdir()) if self.path.parent.is_dir() else ()
        return sorted(n for n in names if n.startswith(stem) and n.endswith(_SUFFIX) and n != self.path.name)


class ResumableWriter(Writer):
    """A writer that keeps what it has when it is interrupted, and goes on from there the next time.

    `resumed` says after entering how many bytes of tensors were there already.
    """

    def __init__(
        self,
        outputs: Sequence[Output],
        places: dict[str, Extent],
        journal: Journal,
        folder: FolderChange | None = None,
    ) -> None:
        super().__init__(outputs, places, folder)
        self.journal = journal
        self.resumed = 0
        self._numbers = {str(output.temporary): number for number, output in enumerate(outputs)}
        self._there: dict[str, list[tuple[int, int]]] = {}
        self._fresh: list[tuple[int, int, int]] = []
        self._fresh_bytes = 0
        self._mine = self._recorded = False

    def _create(self) -> None:
        self._make_folders(self.journal.path.parent)
        said = self.journal.open()
        self._mine = True
        there = {n: name for name, n in self._numbers.items() if self._as_left(self._outputs[n])}
        runs: dict[int, list[tuple[int, int]]] = {number: [] for number in there}
        for number, start, stop in said:
            runs.get(number, []).append((start, stop))
        self._there = {name: _merged(runs[number]) for number, name in there.items()}
        lost = {n for n, _, _ in said} - there.keys()
        if lost:  # a file that is made anew must not inherit what was said of the old one
            self.journal.remove()
            self.journal.open()
            self.journal.record([(self._numbers[f], a, b) for f, runs in self._there.items() for a, b in runs])
        super()._create()
        self.resumed = sum(stop - start for runs in self._there.values() for start, stop in runs)

    def _allocated(self) -> int:
        return sum(Path(name).stat().st_blocks * 512 for name in self._there)

    def _as_left(self, output: Output) -> bool:
        """Whether an unfinished file is there with the size and the header that it should have."""
        try:
            with output.temporary.open("rb") as file:
                return os.fstat(file.fileno()).st_size == output.size and file.read(len(output.head)) == output.head
        except OSError:
            return False

    def _begin(self, output: Output) -> int:
        if str(output.temporary) in self._there:
            return os.open(output.temporary, os.O_RDWR | os.O_CLOEXEC)
        output.temporary.unlink(missing_ok=True)
        return super()._begin(output)

    def has(self, file: str, offset: int, nbytes: int) -> bool:
        """Whether an earlier run wrote all of a run of bytes."""
        runs = self._there.get(file)
        if not runs:
            return False
        at = bisect.bisect_right(runs, (offset, 1 << 63)) - 1
        return at >= 0 and runs[at][0] <= offset and offset + nbytes <= runs[at][1]

    def _note(self, file: str, offset: int, nbytes: int) -> None:
        with self._lock:
            self._fresh.append((self._numbers[file], offset, offset + nbytes))
            self._fresh_bytes += nbytes
            full = self._fresh_bytes >= _SYNC_EVERY
        if full:
            try:
                self._record()
            except OSError as error:
                raise os_error(error, str(self.journal.path), "write") from error

    def _record(self) -> None:
        """Sync the data, and only then say that it is there."""
        with self._lock:
            fresh, self._fresh, self._fresh_bytes = self._fresh, [], 0
        if not fresh:
            return
        by_file: dict[int, list[tuple[int, int]]] = {}
        for number, start, stop in fresh:
            by_file.setdefault(number, []).append((start, stop))
        names = list(self._numbers)
        for number in by_file:
            with self._descriptors.using(names[number]) as descriptor:
                os.fdatasync(descriptor)
        self.journal.record([(n, a, b) for n, runs in sorted(by_file.items()) for a, b in _merged(runs)])
        self._recorded = True

    def _complete(self) -> None:
        super()._complete()
        self._record()

    def _appear(self) -> None:
        super()._appear()
        self.journal.remove()

    def discard(self) -> None:
        """Removes everything temporary, also what another run could go on from: for an output that is wrong."""
        if self._mine:
            self._mine = False
            super().abort()
            self.journal.remove()

    def abort(self) -> None:
        """Keeps what is there for the next run; where that is nothing, removes everything temporary."""
        if not self._mine:
            self._remove_folders()  # the files belong to the process that holds the journal
            return
        with contextlib.suppress(OSError):
            self._record()
        self._mine = False
        if self._recorded or any(self._there.values()):
            self._close()
            self.journal.close()
        else:
            super().abort()
            self.journal.remove()


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs in order, those that touch made one.

    >>> _merged([(4, 6), (0, 2), (2, 3)])
    [(0, 3), (4, 6)]
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged
