"""Time and memory of the ops on quantised weights, beside those of the libraries that made the formats.

Run it where `scripts/formats/quantised_references.py` runs:

    OMP_NUM_THREADS=1 python scripts/bench/dequantise.py --rows 4096 --columns 4096 --rounds 5

Each case gets a process of its own. Ours and the reference take turns in it, and medians are printed. Memory is the
peak of the resident set less what was resident before: in memory, where the sources and the result are there on both
sides, and from file to file, where the result is not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ckptsurgery as cs

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
from quantised_references import CASES, made

MIB = 1 << 20


def resident(field: str) -> int:
    """A field of the process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(work: Callable[[], object]) -> tuple[float, float, int]:
    """Seconds on the clock, seconds of all cores, and bytes held beyond those of before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is resident no more
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, clock, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    kept = work()
    taken = time.perf_counter() - clock, time.process_time() - cpu, resident("VmHWM") - before
    del kept
    return taken


def compare(name: str, rows: int, columns: int, rounds: int) -> None:
    """Print the line of one case."""
    torch.set_num_threads(1)
    case, small = CASES[name](rows, columns), CASES[name](256, 256)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "x.safetensors"), Path(folder, "y.safetensors")
        cs.save(case.tensors, source)

        def to_file() -> None:
            cs.plan(source, case.rule).save(target, overwrite=True, sync=False)

        made(small), small.reference(), to_file()  # imports and tables
        found: dict[str, list[tuple[float, float, int]]] = {"ours": [], "theirs": [], "file": []}
        for _ in range(rounds):
            found["ours"].append(measured(lambda: made(case)))
            found["theirs"].append(measured(case.reference))
            found["file"].append(measured(to_file))
    middle = {label: [statistics.median(column) for column in zip(*runs)] for label, runs in found.items()}
    (ours, cpu, held), (theirs, their_cpu, their_held) = middle["ours"], middle["theirs"]
    print(
        f"{name:22} {ours * 1e3:8.1f} {theirs * 1e3:8.1f} x{theirs / ours:5.1f} {cpu * 1e3:8.1f} {their_cpu * 1e3:8.1f}"
        f" {held / MIB:8.1f} {their_held / MIB:8.1f} {middle['file'][2] / MIB:8.1f}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", help="cases to measure; all of them where left out")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.only and len(given.only) == 1:
        compare(given.only[0], given.rows, given.columns, given.rounds)
    else:
        head = "ms, times faster; CPU ms of both; MiB of both, and of ours to a file"
        print(f"{'case':22} {'ours':>8} {'theirs':>8} {head}", flush=True)
        for one in given.only or CASES:
            size = [f"--rows={given.rows}", f"--columns={given.columns}", f"--rounds={given.rounds}"]
            subprocess.run([sys.executable, __file__, "--only", one, *size], check=True)
