"""Kills saves at every system call that changes something, or makes that call fail, and looks what is left.

    python scripts/fuzz/crashes.py              # every third point of each story
    python scripts/fuzz/crashes.py --every 1    # all of them

For each point a fresh child runs the story with one fault in it: SIGKILL before the call, ENOSPC, EIO, or a write that
takes half of its bytes. Then the source must be untouched and the destination absent, old or new, to this library and
to a reader that knows an index and shards only; and running the same again must finish the job and leave nothing.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

import ckptsurgery as cs

CALLS = ("pwrite", "write", "open", "ftruncate", "fsync", "fdatasync", "mkdir", "rename", "replace", "unlink", "rmdir")
FAULTS = ("kill", "ENOSPC", "EIO", "short")
MARK = ".ckptsurgery-tmp-"
_RULE = "{k...} -> {k...}"


@dataclass(frozen=True, slots=True)
class Story:
    """A save, and where it reads and writes, relative to a folder of its own."""

    name: str
    source: str
    target: str
    run: Callable[[Path, Path], object]
    old: Callable[[Path], object] | None = None


def _values(start: int) -> dict[str, bytes]:
    return {f"layers.{i}.w": bytes([start + i]) * 4000 for i in range(6)}


def write_checkpoint(path: Path, start: int, shards: int | None = None) -> None:
    """Six tensors whose bytes tell one checkpoint from another."""
    from ckptsurgery.storage import open_writer

    values = _values(start)
    specs = {key: cs.TensorSpec([len(data)], "U8") for key, data in values.items()}
    limit = None if shards is None else 4000 * (6 // shards)
    with open_writer(path, specs, max_shard_size=limit, overwrite=True) as writer:
        for key, place in writer.places.items():
            writer.write(place.file, place.offset, values[key])


def contents(path: Path) -> dict[str, bytes] | str:
    """What a path holds, or the code of the error."""
    try:
        with cs.open(path) as checkpoint:
            return {key: bytes(checkpoint.read(key)) for key in checkpoint}
    except cs.CheckpointError as error:
        return error.diagnostics[0].code


def naive(path: Path) -> dict[str, bytes] | None:
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


def _all_of(path: Path) -> dict[str, bytes]:
    return {key: value.tobytes() for key, value in load_file(path).items()}


def _save(**options: Any) -> Callable[[Path, Path], object]:
    def run(source: Path, target: Path) -> object:
        with cs.open(source) as checkpoint:
            return cs.plan(checkpoint, _RULE).save(target, overwrite=True, progress=False, **options)

    return run


def _old(shards: int | None) -> Callable[[Path], object]:
    return lambda target: write_checkpoint(target, 100, shards)


STORIES = (
    Story("convert to a file in new folders", "s.safetensors", "a/b/t.safetensors", _save()),
    Story("convert over a file", "s.safetensors", "t.safetensors", _save(), _old(None)),
    Story("convert to a new folder of shards", "s.safetensors", "t", _save(max_shard_size=9000)),
    Story("re-shard over other shards", "s.safetensors", "t", _save(max_shard_size=9000), _old(2)),
    Story("shards over equal names", "s.safetensors", "t", _save(max_shard_size=8000), _old(3)),
    Story("one file over shards", "s.safetensors", "t", _save(), _old(3)),
    Story("shards over one file", "s.safetensors", "t", _save(max_shard_size=9000), _old(None)),
    Story("re-shard in place", "t", "t", _save(max_shard_size=9000), _old(2)),
    Story("convert a file in place", "t.safetensors", "t.safetensors", _save(), _old(None)),
    Story(
        "save a torch file",
        "s.safetensors",
        "t.pt",
        _save(),
        lambda target: _save()(target.parent / "o.safetensors", target),
    ),
    Story("resumable, to a file", "s.safetensors", "t.safetensors", _save(resume=True)),
    Story("resumable, to a new folder", "s.safetensors", "t", _save(max_shard_size=9000, resume=True)),
    Story("resumable, over other shards", "s.safetensors", "t", _save(max_shard_size=9000, resume=True), _old(2)),
)


class Fault:
    """Stands in front of the system calls, counts them, and strikes at one."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at, self.count = kind, at, 0
        self.log: list[str] = []
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **options: Any) -> Any:
            if name == "open" and not (len(args) > 1 and args[1] & os.O_CREAT):
                return call(*args, **options)
            self.count += 1
            self.log.append(name)
            if self.count != self.at:
                return call(*args, **options)
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "short":
                half = (args[0], memoryview(args[1])[: max(1, len(args[1]) // 2)], *args[2:])
                return call(*half) if "write" in name else call(*args, **options)
            raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))

        return faulty


def _child(story: Story, folder: Path, kind: str, at: int) -> tuple[str, list[str]]:
    """Run a story in a child; how it ended, and the calls it made."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        fault, end = Fault(kind, at), "done"
        try:
            story.run(folder / story.source, folder / story.target)
        except cs.CkptSurgeryError as error:
            end = error.diagnostics[0].code
        except Exception as error:
            end = f"{type(error).__name__}: {error}"
        os.dup2(write, 3)
        with open(3, "wb", closefd=False) as out:
            out.write(json.dumps([end, fault.log]).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as told:  # noqa: PTH123 - a descriptor
        text = told.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}", []
    end, log = json.loads(text)
    return end, log


def _prepare(story: Story, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if story.source != story.target:
        write_checkpoint(folder / story.source, 1)
    write_checkpoint(folder / "o.safetensors", 100)
    if story.old is not None:
        story.old(folder / story.target)


def _left(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if MARK in p.name)


def strike(story: Story, folder: Path, kind: str, at: int) -> Iterator[str]:
    """One fault at one point; what is wrong afterwards."""
    _prepare(story, folder)
    source, target = folder / story.source, folder / story.target
    in_place = source == target
    old = contents(target) if story.old else None
    new = old if in_place else _values(1)
    end, _ = _child(story, folder, kind, at)
    expected = {
        "kill": ("signal 9",),
        "short": ("done",),
        "ENOSPC": ("done", "disk-full"),
        "EIO": ("done", "write-failed"),
    }[kind]
    if end not in expected:
        yield f"it ended with {end!r}"
    if not in_place and contents(source) != new:
        yield "the source changed"
    found = contents(target)
    if found not in ((old, new) if story.old else (new, "missing-file", "nothing-to-read")):
        yield f"the destination is neither old nor new: {found if isinstance(found, str) else sorted(found)}"
    if target.suffix != ".pt" and naive(target) not in (old, new, None):
        yield "another reader finds a mixture"
    if any(
        name.endswith((".safetensors", ".json", ".pt")) and not name.endswith("record.json") for name in _left(folder)
    ):
        yield f"a temporary name looks like a checkpoint: {_left(folder)}"
    if kind in ("ENOSPC", "EIO") and end != "done" and _left(folder) and found != new and "resumable" not in story.name:
        yield f"a failure left {_left(folder)}"
    again, _ = _child(story, folder, "kill", -1)
    if again != "done" or contents(target) != new:
        yield f"running again: {again!r}"
    if target.suffix != ".pt" and naive(target) != new:
        yield "running again does not finish the job for other readers"
    if [name for name in _left(folder) if not name.endswith(".journal")]:
        yield f"running again leaves {_left(folder)}"


def main() -> None:
    """Tell every story with every fault at every point, and print how many points were survived."""
    parser = argparse.ArgumentParser(description="Kill saves at every system call that changes something.")
    parser.add_argument("--every", type=int, default=3, help="of so many points, take one")
    parser.add_argument("--folder", help="where to write; one in memory is quickest")
    options = parser.parse_args()
    survived: Counter[str] = Counter()
    problems = 0
    with tempfile.TemporaryDirectory(prefix="crashes-", dir=options.folder) as root:
        folder = Path(root, "case")
        for story in STORIES:
            _prepare(story, folder)
            story.run(folder / story.source, folder / story.target)  # what is imported late is there for the children
            _prepare(story, folder)
            end, log = _child(story, folder, "kill", -1)
            if end != "done":
                sys.exit(f"{story.name}: {end}")
            for number, name in enumerate(log, 1):
                if number % options.every and number < len(log) - 12:  # the end, where names are taken, is told in full
                    continue
                for kind in FAULTS if "write" in name else FAULTS[:3]:
                    wrong = list(strike(story, folder, kind, number))
                    problems += len(wrong)
                    survived[kind] += not wrong
                    for text in wrong:
                        print(f"{story.name}, {kind} at {name} ({number} of {len(log)}): {text}", file=sys.stderr)
    print(json.dumps({"crash points survived": survived.total(), **survived}))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
