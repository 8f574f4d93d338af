"""Measure the witness: the time of `check_loaded` against the time of reading the file it checks.

    python scripts/bench/witness.py --gigabytes 1

The file is in the page cache for both. Reading is `readinto` of one buffer of 8 MiB until the end; the check compares
every byte of a model that was loaded by `load_state_dict` with what the file says. The best of several rounds counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import ckptsurgery as cs


def best(rounds: int, run: Callable[[], object]) -> float:
    """Return the shortest time of several rounds, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read(path: Path) -> None:
    """Read a file once."""
    buffer = bytearray(8 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def model(layers: int, width: int) -> torch.nn.Module:
    """A stack of linear layers."""
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))


def main() -> None:
    """Measure, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    width = 2048
    layers = max(1, round(options.gigabytes * 1e9 / (4 * width * width)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(model(layers, width).state_dict(), path)
        loaded = model(layers, width)
        loaded.load_state_dict(load_file(path))
        cs.check_loaded(loaded, path)  # imports, and the pages of the model
        reading = best(options.rounds, lambda: read(path))
        checking = best(options.rounds, lambda: cs.check_loaded(loaded, path))
        size = path.stat().st_size
    print(f"{size / 1e9:.2f} GB: read in {reading:.3f} s, checked in {checking:.3f} s, {checking / reading:.2f} x")


if __name__ == "__main__":
    main()
