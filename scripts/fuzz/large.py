"""Checkpoints that are large in one way, made, converted, looked at and removed again; by hand, as it takes minutes.

python scripts/fuzz/large.py keys --count 1000000      # one file of about 80 MB of header
python scripts/fuzz/large.py shards --count 10000      # also after: ulimit -n 256
python scripts/fuzz/large.py elements                  # one tensor of more than 2^31; takes 6 GB of disk
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import ckptsurgery as cs


class Told:
    """Prints what each step took."""

    def __init__(self) -> None:
        self._since = time.process_time()

    def __call__(self, step: str) -> None:
        """One line: CPU seconds since the last step, peak memory and open descriptors."""
        now, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        open_now = len(list(Path("/proc/self/fd").iterdir()))
        print(f"{step}: {now - self._since:.1f} s, peak {peak:,} MB, {open_now} descriptors", flush=True)
        self._since = time.process_time()


def write(path: Path, rows: dict[str, object], data: bytes = b"", size: int = 0) -> int:
    """A safetensors file with holes up to `size` where there is no data; says where the data starts."""
    header = json.dumps(rows, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + data)
        file.truncate(8 + len(header) + max(size, len(data)))
    return 8 + len(header)


def keys(count: int, folder: Path, told: Told) -> None:
    """Very many tensors of a byte."""
    source, renamed = folder / "s.safetensors", folder / "renamed.safetensors"
    rows: dict[str, object] = {
        f"l.{i // 100}.e.{i % 100}.w": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)
    }
    write(source, rows, bytes(i % 251 for i in range(count)))
    last, rows = list(rows)[-1], {}
    told(f"made {count:,} keys")
    checkpoint = cs.open(source)
    told("open")
    plan = cs.plan(checkpoint, "l.{i}.e.{j}.w -> m.{i}.e.{j}.w")
    told("plan")
    plan.save(renamed)
    told("save")
    cs.plan(checkpoint, "l.{i}.e.{j}.w -> m.{i}.w [j ...]").save(folder / "stacked.safetensors")
    told("stack")
    str(cs.summary(checkpoint))
    told("summary")
    str(cs.doctor(source))
    told("doctor")
    str(cs.diff(checkpoint, renamed))
    told("diff of other names")
    assert cs.diff(checkpoint, source).identical
    told("diff of equals")
    assert cs.open(renamed).read(f"m{last[1:]}")[0] == (count - 1) % 251


def shards(count: int, folder: Path, told: Told) -> None:
    """Very many files of one tensor."""
    many, one, again = folder / "many", folder / "one.safetensors", folder / "again"
    many.mkdir()
    rows: dict[str, object]
    for i in range(count):
        rows = {f"l.{i}.w": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}
        write(many / f"m-{i + 1:05d}-of-{count:05d}.safetensors", rows, i.to_bytes(4, "little") * 4)
    told(f"made {count:,} shards, {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} descriptors allowed")
    checkpoint = cs.open(many)
    assert all(int(checkpoint.load(f"l.{i}.w")[3]) == i for i in range(count))
    told("open and read")
    cs.plan(checkpoint, "l.{i}.w -> m.{i}.w").save(one)
    told("into one file")
    for overwrite in (False, True):
        cs.plan(one, "m.{i}.w -> l.{i}.w").save(again, max_shard_size=16, overwrite=overwrite)
        told("over them" if overwrite else "into shards again")
    cs.plan(again, "l.{i}.w | cast(i64) -> l.{i}.w").save(folder / "cast", max_shard_size=32, check=True)
    told("cast and checked")
    assert cs.diff(checkpoint, again).identical
    assert cs.doctor(again).healthy
    told("diff and doctor")
    cs.save(cs.open(again).state_dict(), folder / "state", max_shard_size=16)
    told("as a state_dict")


def elements(count: int, folder: Path, told: Told) -> None:
    """One tensor of more elements than 32 bits with a sign can count."""
    import torch

    rows, made = (1 << 31) // 4096 + 1, folder / "made.safetensors"
    source, numel = folder / "s.safetensors", rows * 4096
    row = {"dtype": "U8", "shape": [rows, 4096], "data_offsets": [0, numel]}
    start = write(source, {"w": row}, size=numel)
    with source.open("r+b") as file:
        for at, data in ((0, b"\1\2"), (4096, b"\5"), (numel - 2, b"\3\4")):
            file.seek(start + at)
            file.write(data)
    cs.plan(source, "w -> m").save(made)
    assert bytes(cs.open(made).read("m", numel - 2)) == b"\3\4"
    told(f"renamed {numel:,} elements")
    cs.plan(source, "w [a b] -> m [b a]").save(made, overwrite=True)
    turned = cs.open(made).load("m")
    assert [int(turned[at]) for at in ((0, 0), (1, 0), (0, 1), (-2, -1), (-1, -1))] == [1, 2, 5, 3, 4]
    del turned
    told("transposed")
    cs.plan(source, "w | cast(f16) -> m").save(made, overwrite=True)
    assert cs.open(made)["m"][rows - 1][-2:].tolist() == [3, 4]
    told("cast")
    made.unlink()
    cs.plan(source, "w -> m").save(folder / "made.pt")
    assert torch.load(folder / "made.pt", mmap=True)["m"][-1, -2:].tolist() == [3, 4]
    cs.plan(folder / "made.pt", "m -> w").save(made)
    assert bytes(cs.open(made).read("w", numel - 2)) == b"\3\4"
    told("through a torch zip")


def main() -> None:
    """The program."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("what", choices=["keys", "shards", "elements"])
    asked.add_argument("--count", type=int, default=10_000)
    asked.add_argument("--folder", type=Path, help="where to make it; a temporary folder if left out")
    given = asked.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        {"keys": keys, "shards": shards, "elements": elements}[given.what](given.count, folder, Told())
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
