"""Does the same things thousands of times in one process, and holds what the process has then to what it had before.

    python scripts/fuzz/soak.py                          # 200 rounds of each
    python scripts/fuzz/soak.py --conversions 10000 --others 2000

Descriptors, threads and files must be as many as before. Memory may grow while allocators and caches find their size:
so the first quarter of the rounds is not counted, and the rest may not add more than a byte bound a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import ckptsurgery as cs

_NOISE = 6 << 20
"""Bytes that an allocator takes or not, whatever was done."""
_A_ROUND = 200
"""Bytes a round above which something is kept."""


@dataclass(frozen=True)
class Held:
    """What the process has: bytes of memory, descriptors, threads, files in the folder."""

    memory: int
    descriptors: int
    threads: int
    files: int

    @classmethod
    def now(cls, folder: Path) -> Held:
        """After a collection."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        memory = pages * resource.getpagesize()
        return cls(memory, descriptors, threading.active_count(), sum(1 for _ in folder.rglob("*")))


def jobs(folder: Path) -> dict[str, Callable[[], object]]:
    """What is done again and again, by name; each leaves the same files each time."""
    state = {f"layers.{i}.w": torch.full((8, 4), float(i)) for i in range(3)}
    source, zipped, bad = folder / "s.safetensors", folder / "s.pt", folder / "bad.safetensors"
    cs.save(state, source)
    torch.save(state, zipped)
    bad.write_bytes(source.read_bytes()[:-1])
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 8, bias=False) for _ in range(3)])
    named = {f"layers.{i}.weight": value for i, value in enumerate(state.values())}
    cs.save(named, folder / "named.safetensors")

    def convert() -> None:
        with cs.open(source) as checkpoint:
            rule = "layers.{i}.w [a b] -> h.{i}.w [b a]"
            cs.plan(checkpoint, rule).save(folder / "out.safetensors", overwrite=True)

    def shard() -> None:
        with cs.open(zipped) as checkpoint:
            cs.plan(checkpoint, "layers.{i}.w -> h.{i}.w").save(folder / "out", overwrite=True, max_shard_size=128)

    def fail() -> None:
        with suppress(cs.CheckpointError):
            cs.open(bad)
        with suppress(cs.PlanError):
            cs.plan(source, "nothing -> x").save(folder / "never.safetensors")
        with suppress(cs.PlanError):
            cs.plan(source, "layers.{i}.w -> h.{i}.w").save(folder / "never", max_memory=1)

    def read() -> None:
        with cs.open(zipped) as checkpoint:
            assert checkpoint.load("layers.2.w")[7, 3] == 2

    def look() -> None:
        cs.open(source).close()
        assert len(cs.open(source).state_dict()) == 3  # left to the collector

    return {
        "conversions": convert,
        "re-sharding of a torch zip": shard,
        "failing conversions": fail,
        "cs.open": look,
        "reading a torch zip": read,
        "load_into": lambda: cs.load_into(model, folder / "named.safetensors"),
        "cs.doctor": lambda: cs.doctor(source),
        "cs.suggest": lambda: cs.suggest(source, folder / "named.safetensors"),
        "cs.diff": lambda: cs.diff(source, zipped),
    }


def soak(name: str, job: Callable[[], object], rounds: int, folder: Path) -> str | None:
    """Do it; says what was kept, or None."""
    for _ in range(max(1, rounds // 4)):
        job()
    before = Held.now(folder)
    for _ in range(rounds):
        job()
    after = Held.now(folder)
    grown = after.memory - before.memory
    print(
        f"{rounds:,} x {name}: memory {grown / 1024:+,.0f} KB ({grown / rounds:+.0f} bytes a round),"
        f" descriptors {after.descriptors - before.descriptors:+d}, threads {after.threads - before.threads:+d},"
        f" files {after.files - before.files:+d}",
        flush=True,
    )
    others = (before.descriptors, before.threads, before.files) == (after.descriptors, after.threads, after.files)
    return None if others and grown < _NOISE + _A_ROUND * rounds else f"{name}: {before} became {after}"


def main() -> None:
    """The program."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--conversions", type=int, default=200)
    asked.add_argument("--others", type=int, default=200, help="rounds of everything else")
    asked.add_argument("--only", help="one of them, by name")
    asked.add_argument("--json", action="store_true", help="print what was kept as JSON")
    given = asked.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        found = {
            what: soak(what, job, given.conversions if what == "conversions" else given.others, Path(name))
            for what, job in jobs(Path(name)).items()
            if given.only in (None, what)
        }
    kept = [text for text in found.values() if text]
    if given.json:
        print(json.dumps(kept))
    sys.exit("\n".join(kept) if kept else 0)


if __name__ == "__main__":
    main()
