"""Replacing several files of a folder as one: a record on the disk decides which of two checkpoints the folder holds.

Files cannot be renamed together. So once all new files are synced under temporary names, a record of what takes which
name is written, synced and renamed into its place, and from that moment on the folder holds the new checkpoint:
readers look at the record, and find each file under its new name or, as long as the renaming has not come to it,
under its temporary one. When everything is renamed, the record goes. A process that is killed on the way leaves the
old checkpoint or the new one, and never a mixture.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError, Diagnostic
from ..json_text import parse_json
from ..sources.files import read_regular
from .durability import SYNCED, Durability

__all__ = ["MARK", "RECORD", "Replacement", "locked", "remove_abandoned", "stamp_of"]

MARK = ".ckptsurgery-tmp-"
RECORD = f"{MARK}record.json"
# The names that runs which cannot be resumed give to what they write; the others have a journal.
_TEMPORARY = re.compile(re.escape(MARK) + r"\d+-[0-9a-f]{8}\Z")


@dataclass(frozen=True, slots=True)
class Replacement:
    """Which files of a folder take which names, and which go.

    Args:
        folder: the folder.
        hidden: indices of the former checkpoint, which go first, so that none joins old and new shards.
        renamed: `(temporary, final)` names in order, the one that makes the others valid last.
        removed: other files of the former checkpoint, which go at the end.
    """

    folder: Path
    hidden: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Replacement | None:
        """The replacement that the folder's record tells of, or None where there is no record.

        Raises:
            CheckpointError: the record is damaged, or names what does not lie in the folder.
        """
        path = folder / RECORD
        try:
            told = parse_json(read_regular(path))
            made = cls(folder, tuple(told["hidden"]), tuple((a, b) for a, b in told["renamed"]), tuple(told["removed"]))
            names = [*made.hidden, *made.removed, *(name for pair in made.renamed for name in pair)]
            if not all(map(_is_inside, names)) or not all(MARK in a and b[0] != "." for a, b in made.renamed):
                raise ValueError("it names other files")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                Diagnostic(
                    "bad-record",
                    f"the record of a save in {str(folder)!r} cannot be trusted: {error}",
                    str(path),
                    help="look what is in the folder, then remove the record",
                )
            ) from None
        return made

    def write(self, durability: Durability = SYNCED) -> None:
        """Make it so: when this returns, the folder holds the new checkpoint, and when it raises, the old one.

        A record that is there already is replaced: the new checkpoint takes the place of what it decided.
        """
        text = json.dumps({"hidden": self.hidden, "renamed": self.renamed, "removed": self.removed}).encode()
        temporary = self.folder / f"{RECORD}-new"
        with contextlib.ExitStack() as undone:
            undone.callback(_unlink, temporary)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                done = 0
                while done < len(text):
                    done += os.write(descriptor, text[done:])
                durability.keep(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(self.folder / RECORD)
            undone.pop_all()

    def carry_out(self, durability: Durability = SYNCED) -> None:
        """Give the files their names; a second call, after a first that was interrupted, goes on."""
        durability.keep_names(self.folder)  # the record first: what is done here must not outlive it
        temporary = {final: name for name, final in self.renamed}
        for name in self.hidden:
            # One that has its new name already is the new index.
            if name not in temporary or (self.folder / temporary[name]).exists():
                (self.folder / name).unlink(missing_ok=True)
        for name, final in self.renamed:
            if (self.folder / name).exists():
                (self.folder / name).replace(self.folder / final)
        for name in self.removed:
            (self.folder / name).unlink(missing_ok=True)
        for parent in dict.fromkeys((self.folder / final).parent for _, final in reversed(self.renamed)):
            durability.keep_names(parent)
        (self.folder / RECORD).unlink(missing_ok=True)
        durability.keep_names(self.folder)

    def names(self, present: Iterable[str]) -> list[str]:
        """The names that the folder has once all is done, from those that are present."""
        finals = dict.fromkeys(final for _, final in self.renamed)
        gone = {*self.hidden, *self.removed, *(name for name, _ in self.renamed)} - finals.keys()
        return list(finals | dict.fromkeys(name for name in present if name not in gone))

    def places(self) -> dict[str, str]:
        """Path -> the path under which its file still lies."""
        pairs = ((self.folder / name, self.folder / final) for name, final in self.renamed)
        return {str(final): str(temporary) for temporary, final in pairs if temporary.exists()}


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _is_inside(name: object) -> bool:
    return isinstance(name, str) and bool(name) and name[0] != "/" and ".." not in name.split("/") and "\0" not in name


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until no other process that uses this function is inside for the same folder."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks: then there is no waiting
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """What tells a file from the one that another run would put in its place; None where there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def remove_abandoned(outputs: Sequence[Path]) -> None:
    """Remove what runs that were killed left beside outputs of one folder: nobody holds a lock on any of it any more.

    A run that writes more files than it may hold open has locks on some of them only.
    """
    folder, starts = outputs[0].parent, {f".{path.name[:120]}" for path in outputs}
    try:
        decided = Replacement.read(folder)
        named = {name for name, _ in decided.renamed} if decided else set()
        names = [path.name for path in folder.iterdir()]
    except (OSError, CheckpointError):
        return
    runs: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if (match := _TEMPORARY.search(name)) and name not in named:
            runs.setdefault(match.group(), []).append((name[: match.start()], name))
    for left in runs.values():
        mine = [folder / name for start, name in left if start in starts]
        if mine and not any(_in_use(folder / name) for _, name in left):
            for path in mine:
                with contextlib.suppress(OSError):
                    _remove(path)


def _remove(left: Path) -> None:
    if not stat.S_ISDIR(left.lstat().st_mode):
        left.unlink()
        return
    for file in left.iterdir():
        _remove(file)
    left.rmdir()


def _in_use(path: Path) -> bool:
    """Whether a process holds a lock on a file, or on one of those in a folder; what cannot be looked at is in use."""
    import fcntl

    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            return any(map(_in_use, sorted(path.iterdir())))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True  # held, or there are no locks here and nobody can tell
    finally:
        os.close(descriptor)
    return False
