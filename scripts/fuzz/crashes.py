"""Kills saves at every system call that changes something, or makes that call fail, and looks what is left.

    python scripts/fuzz/crashes.py              # of all pairs of a point and a fault, every third
    python scripts/fuzz/crashes.py --every 1    # all of them

At each point one fault strikes (`faults.py`): SIGKILL before the call or in the middle of a write, a power cut that
loses what was not synced, a full disk, an I/O error, a signal, Ctrl-C, a write that takes half of its bytes. Then the
source must be untouched and the destination absent, old or new, to this library and to a reader that knows an index and
shards only; a failure must leave nothing; and running the same again must finish the job and leave nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import DEADLY, Disk, Faults, Struck, kinds_for, lose, watch
from safetensors import SafetensorError
from safetensors.numpy import load_file

import ckptsurgery as cs
from ckptsurgery.running.executor import copying
from ckptsurgery.storage.output import resuming
from ckptsurgery.storage.output.header_swap import restore_header
from ckptsurgery.storage.output.writing import WriterOptions, open_writer

MARK = ".ckptsurgery-tmp-"
_HEADERS = 4000  # bytes, at most, of headers and an index
Contents = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Story:
    """A save, and where it reads and writes, relative to a folder of its own.

    Args:
        old: makes what lies at the target before.
        resumes: what a failure leaves is meant to be gone on from.
        once: what is done already cannot be done again, and a crash may ask for `restore_header`.
        synced: whether it waits for the disk, without which a power cut may do what it likes.
    """

    name: str
    source: str
    target: str
    run: Callable[[Path, Path], object]
    old: Callable[[Path], object] | None = None
    resumes: bool = False
    once: bool = False
    synced: bool = True


def write_checkpoint(path: Path, start: int, shards: int | None = None) -> None:
    """Six tensors whose bytes tell one checkpoint from another."""
    values = {f"layers.{i}.w": bytes([start + i]) * 4000 for i in range(6)}
    specs = {key: cs.TensorSpec([len(data)], "U8") for key, data in values.items()}
    limit = None if shards is None else 4000 * (6 // shards)
    with open_writer(path, specs, WriterOptions(max_shard_size=limit, overwrite=True)) as writer:
        for key, place in writer.places.items():
            writer.write(place.file, place.offset, values[key])


def contents(path: Path) -> Contents | str:
    """What a path holds, or the code of the error."""
    try:
        with cs.open(path) as checkpoint:
            return {key: bytes(checkpoint.read(key)) for key in checkpoint}
    except cs.CheckpointError as error:
        return error.diagnostics[0].code


def naive(path: Path) -> Contents | None:
    """What a reader finds that knows nothing of this library: the single file first, then the index."""
    if path.suffix == ".safetensors":
        return _all_of(path) if path.exists() else None
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return _all_of(single)
    if not index.exists():
        return None
    found = {}
    for key, name in json.loads(index.read_text())["weight_map"].items():
        found[key] = _all_of(path / name)[key]
    return found


def _all_of(path: Path) -> Contents:
    return {key: value.tobytes() for key, value in load_file(path).items()}


def _convert(rule: str = "{k...} -> {k...}", **options: Any) -> Callable[[Path, Path], object]:
    def run(source: Path, target: Path) -> object:
        with cs.open(source) as checkpoint:
            return cs.plan(checkpoint, rule).save(target, overwrite=True, progress=False, **options)

    return run


def _in_kernel(run: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
    """A story whose tensors, though small, are copied by the kernel."""

    def told(source: Path, target: Path) -> object:
        before, copying._LONG = copying._LONG, 1000
        try:
            return run(source, target)
        finally:
            copying._LONG = before

    return told


def _save(source: Path, target: Path) -> object:
    with cs.open(source) as checkpoint:
        return cs.save(checkpoint, target, max_shard_size=9000, overwrite=True, progress=False)


def _old(shards: int | None) -> Callable[[Path], object]:
    return lambda target: write_checkpoint(target, 100, shards)


def _old_torch(target: Path) -> None:
    _convert()(target.with_name("o.safetensors"), target)


def _restore(_: Path, target: Path) -> None:
    restore_header(target)


def _changed(target: Path) -> None:
    write_checkpoint(target, 100)
    _in_place(target, target)


_in_place = _convert("layers.{i}.w -> m.{i}.w", in_place=True)
_FILE, _SHARDS = ("s.safetensors", "t.safetensors"), ("s.safetensors", "t")

STORIES = (
    Story("convert to a file in new folders", "s.safetensors", "a/b/t.safetensors", _convert()),
    Story("convert over a file", *_FILE, _convert(), _old(None)),
    Story("convert to a new folder of shards", *_SHARDS, _convert(max_shard_size=9000)),
    Story("re-shard over other shards", *_SHARDS, _convert(max_shard_size=9000), _old(2)),
    Story("shards over equal names", *_SHARDS, _convert(max_shard_size=8000), _old(3)),
    Story("one file over shards", *_SHARDS, _convert(), _old(3)),
    Story("shards over one file", *_SHARDS, _convert(max_shard_size=9000), _old(None)),
    Story("re-shard in place", "t", "t", _convert(max_shard_size=9000), _old(2)),
    Story("convert a file over itself", "t.safetensors", "t.safetensors", _convert(), _old(None)),
    Story("save over other shards", *_SHARDS, _save, _old(2)),
    Story("checked, with companions, to a new folder", "s.safetensors", "t", _convert(check=True, companions=True)),
    Story("checked, with companions, over shards", *_SHARDS, _convert(check=True, companions=True), _old(2)),
    Story("save a torch file", "s.safetensors", "t.pt", _convert(), _old_torch),
    Story("change a header in place", "t.safetensors", "t.safetensors", _in_place, _old(None), once=True),
    Story("restore a header", "t.safetensors", "t.safetensors", _restore, _changed, once=True),
    Story("resumable, to a file", *_FILE, _convert(resume=True), resumes=True),
    Story("resumable, to a new folder", *_SHARDS, _convert(max_shard_size=9000, resume=True), resumes=True),
    Story("resumable, over other shards", *_SHARDS, _convert(max_shard_size=9000, resume=True), _old(2), resumes=True),
    Story("in the kernel, over a file", *_FILE, _in_kernel(_convert()), _old(None)),
    Story("in the kernel, shards over other shards", *_SHARDS, _in_kernel(_convert(max_shard_size=9000)), _old(2)),
    Story("in the kernel, resumable", *_FILE, _in_kernel(_convert(resume=True)), resumes=True),
    Story("not synced, over a file", *_FILE, _convert(sync=False), _old(None), synced=False),
    Story("not synced, to a new folder", *_SHARDS, _convert(max_shard_size=9000, sync=False), synced=False),
    Story("not synced, over shards", *_SHARDS, _convert(max_shard_size=9000, sync=False), _old(2), synced=False),
    Story("not synced, a torch file", "s.safetensors", "t.pt", _convert(sync=False), _old_torch, synced=False),
)  # fmt: skip

_ENDS = {
    "short": ("done",),
    "ENOSPC": ("done", "disk-full"),
    "EIO": ("done", "write-failed"),
    "EINTR": ("done", "write-failed"),
    "Ctrl-C": ("interrupted",),
    "late Ctrl-C": ("done", "interrupted"),
}


class Case:
    """One story in a folder of its own, told again and again."""

    def __init__(self, story: Story, root: Path) -> None:
        self.story, self.folder = story, root / "case"
        self.resumed = 0
        self.source, self.target = self.folder / story.source, self.folder / story.target
        self._template, self._grave = root / "template", root / "grave"
        self._template.mkdir()
        if story.source != story.target:
            write_checkpoint(self._template / story.source, 1)
        write_checkpoint(self._template / "o.safetensors", 100)
        (self._template / "config.json").write_text("{}")
        if story.old is not None:
            story.old(self._template / story.target)
        self.prepare()
        self.old, self.before = contents(self.target) if story.old else None, contents(self.source)
        end, self.calls, self.unseen = self._in_child("", -1)
        if end != "done":
            raise SystemExit(f"{story.name}: {end}")
        self.new = contents(self.target)

    def prepare(self) -> None:
        """Everything as it was before."""
        for folder in (self.folder, self._grave):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._template, self.folder)
        self._grave.mkdir()

    def tell(self) -> str:
        """Run the story here; how it ended."""
        self.notes: tuple[str, ...] = ()
        try:
            self.notes = getattr(self.story.run(self.source, self.target), "notes", ())
        except cs.CkptSurgeryError as error:
            return error.diagnostics[0].code
        except Struck:
            return "interrupted"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "done"

    def _in_child(self, kind: str, at: int) -> tuple[str, list[str], list[str]]:
        """Run it in a child, which may die; how it ended, the calls it made, and those that went past the stand-ins."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            power = "power" in kind
            faults = Faults(kind, at, Disk(self._grave) if power else None, write)
            unseen = [] if kind else watch(faults)
            with faults:
                end = self.tell()
            if power:
                faults.die()  # when all is done
            told = json.dumps([end, faults.log, unseen]).encode()
            with open(write, "wb") as out:  # noqa: PTH123 - a descriptor
                out.write(told)
            os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:  # noqa: PTH123 - a descriptor
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            end, log, unseen = json.loads(text)
            return end, log, unseen
        if text:
            lose(json.loads(text), self.folder, names_too=kind == "power")
        return f"signal {os.WTERMSIG(status)}", [], []

    def strike(self, kind: str, at: int) -> Iterator[str]:
        """One fault at one point; what is wrong afterwards."""
        self.prepare()
        if kind in DEADLY:
            end, expected = self._in_child(kind, at)[0], ("signal 9",)
        else:
            held = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
            with Faults(kind, at):
                end, expected = self.tell(), _ENDS[kind]
            # A number that a call has given back and nobody has got yet is lost.
            if kind != "late Ctrl-C" and len(os.listdir("/proc/self/fd")) != held:  # noqa: PTH208
                yield "it left files open"
        if end not in expected:
            yield f"it ended with {end!r}"
        if at > len(self.calls) and contents(self.target) != self.new:
            yield "what was done was not durable"
        yield from self._looked_at(end)
        yield from self._told_again()

    def _looked_at(self, end: str) -> Iterator[str]:
        story, found = self.story, contents(self.target)
        if self.source != self.target and contents(self.source) != self.before:
            yield "the source changed"
        if story.once and end == "signal 9" and found == "interrupted-change":
            restore_header(self.target)
            found = contents(self.target)
        if found not in ((self.old, self.new) if story.old else (self.new, "missing-file", "nothing-to-read")):
            yield f"the destination is neither old nor new: {found if isinstance(found, str) else sorted(found)}"
        yield from self._others_find(self.old, self.new, None)
        left = self._left()
        if any(name.endswith((".safetensors", ".json", ".pt")) and not name.endswith("record.json") for name in left):
            yield f"a temporary name looks like a checkpoint: {left}"
        if end not in ("done", "signal 9") and left and found != self.new and not story.resumes:
            yield f"a failure left {left}"

    def _told_again(self) -> Iterator[str]:
        if not self.story.once or contents(self.target) != self.new:
            with Faults() as calls:
                again = self.tell()
            if again != "done" or contents(self.target) != self.new:
                yield f"running again: {again!r}"
            there = sum(int(n.replace(",", "")) for note in self.notes for n in re.findall(r"^resumed: ([\d,]+)", note))
            self.resumed += there
            if there and calls.written > 24_000 - there + _HEADERS:
                yield f"running again wrote {calls.written} bytes, though {there} were there"
        yield from self._others_find(self.new)
        if left := [name for name in self._left() if not name.endswith(".journal")]:
            yield f"running again leaves {left}"

    def _others_find(self, *expected: object) -> Iterator[str]:
        if self.target.suffix != ".pt":
            try:
                if naive(self.target) not in expected:
                    yield "another reader finds something else"
            except (SafetensorError, OSError, KeyError) as error:
                yield f"another reader fails: {error}"

    def _left(self) -> list[str]:
        marks = (MARK, ".header-backup.new")
        return sorted(
            str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if any(mark in p.name for mark in marks)
        )

    def under_signals(self) -> Iterator[str]:
        """The story while a signal comes every 50 microseconds, in the middle of whatever call there is."""
        self.prepare()
        heard: list[int] = []
        before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
        signal.setitimer(signal.ITIMER_REAL, 5e-5, 5e-5)
        try:
            end = self.tell()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if end != "done" or contents(self.target) != self.new or not heard:
            yield f"it ended with {end!r}"


def main() -> None:
    """Tell every story with every fault at every point, and print how many points were survived."""
    parser = argparse.ArgumentParser(description="Kill saves at every system call that changes something.")
    parser.add_argument("--every", type=int, default=3, help="of so many points and faults, take one")
    parser.add_argument("--folder", help="where to write; one in memory is quickest")
    parser.add_argument("--story", default="", help="only those with this in their name")
    options = parser.parse_args()
    resuming._SYNC_EVERY = 5000  # a journal that says something on the way
    survived: Counter[str] = Counter()
    problems: list[str] = []
    stories = [story for story in STORIES if options.story in story.name]
    for story in stories:
        with tempfile.TemporaryDirectory(prefix="crashes-", dir=options.folder) as root:
            case = Case(story, Path(root).resolve())
            problems += [f"{story.name}: changed behind the harness's back: {what}" for what in case.unseen]
            wrong = list(case.under_signals())
            problems += [f"{story.name}, under signals: {text}" for text in wrong]
            survived["signals"] += not wrong
            strikes = [(kind, n, name) for n, name in enumerate(case.calls, 1) for kind in kinds_for(name)]
            strikes += [(kind, len(case.calls) + 1, "the end") for kind in ("power", "torn power")]
            if not story.synced:
                strikes = [strike for strike in strikes if "power" not in strike[0]]
                problems += [f"{story.name}: it waits for the disk" for name in case.calls if "sync" in name]
            strikes.reverse()  # the end is among those that are taken
            for kind, number, name in strikes[:: options.every]:
                found = list(case.strike(kind, number))
                survived[kind] += not found
                problems += [f"{story.name}, {kind} at {name} ({number} of {len(case.calls)}): {t}" for t in found]
            if story.resumes and not case.resumed:
                problems.append(f"{story.name}: nothing was ever gone on from")
    print("\n".join(problems), file=sys.stderr)
    print(json.dumps({"stories": len(stories), "crash points survived": survived.total(), **survived}))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
