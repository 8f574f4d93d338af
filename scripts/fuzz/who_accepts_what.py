"""Gives every bad file that has a name to this library and to the usual loaders, and prints who accepts what.

    python scripts/fuzz/who_accepts_what.py > table.md

Each loader runs in a child of its own, with 4 GB above what it starts with and ten seconds of computing. "reads" means
that tensors came back, "refuses" that an exception said no; "runs it" that code of the file was executed. The first
rows are sound files, which everybody reads.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from hostile import Case
from huggingface_hub import load_state_dict_from_file, load_torch_model
from nasty import CASES, MARKER
from safetensors.torch import load_file, save_file

import ckptsurgery as cs

_SECONDS = 10  # of computing; ten times as much of waiting
_MEMORY = 4 << 30


def _ours(path: Path) -> None:
    with cs.open(path) as checkpoint:
        checkpoint.state_dict()


def _hub(path: Path) -> None:
    if path.is_dir():
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(torch.ones(1))
        load_torch_model(model, path, strict=False)
    elif path.suffix == ".safetensors":
        load_state_dict_from_file(path)
    else:
        # by the name that it has on the hub, since it goes by suffixes
        load_state_dict_from_file(path.rename(path.with_name("pytorch_model.bin")), safe=False, weights_only=True)


READERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "ckptsurgery": (_ours, ("safetensors", "zip", "pickle", "index")),
    "safetensors": (load_file, ("safetensors",)),
    "torch.load": (lambda path: torch.load(path, weights_only=True), ("zip", "pickle")),
    "torch.load, weights_only=False": (lambda path: torch.load(path, weights_only=False), ("zip", "pickle")),
    "huggingface_hub": (_hub, ("safetensors", "zip", "pickle", "index")),
}


def _sound_index(folder: Path) -> Path:
    inside = CASES["an index of a shard that is not there"].make(folder)
    (inside / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"w": "a.safetensors"}}')
    return inside


def _sound_zip(folder: Path) -> Path:
    torch.save({"w": torch.ones(1)}, folder / "model.pt")
    return folder / "model.pt"


def _sound_safetensors(folder: Path) -> Path:
    save_file({"w": torch.ones(1)}, folder / "model.safetensors")
    return folder / "model.safetensors"


_SOUND = {
    "a sound safetensors file": Case(_sound_safetensors, ("read",), "safetensors"),
    "a sound torch file": Case(_sound_zip, ("read",), "zip"),
    "a sound index and its shard": Case(_sound_index, ("read",), "index"),
}


def outcome(read: Callable[[Path], object], path: Path) -> str:
    """What a reader does with a file, in a child that may break."""
    child = os.fork()
    if child == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        signal.alarm(10 * _SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        warnings.simplefilter("ignore")
        try:
            read(path)
        except MemoryError:
            os._exit(3)
        except Exception as error:
            os._exit(3 if "allocate" in str(error) or "alloc_cpu" in str(error) else 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if (path.parent / MARKER).exists() or (path.parent.parent / MARKER).exists():
        return "**runs it**"
    if os.WIFSIGNALED(status):
        ended = os.WTERMSIG(status)
        return "**hangs**" if ended in (signal.SIGALRM, signal.SIGPROF) else f"**dies** (signal {ended})"
    return {0: "reads", 2: "refuses", 3: "**out of memory**"}[os.waitstatus_to_exitcode(status)]


def main() -> None:
    """Print the table in Markdown."""
    print(f"| bad file | {' | '.join(READERS)} |")
    print("|---|" + "---|" * len(READERS))
    for name, case in (_SOUND | CASES).items():
        cells = []
        for read, kinds in READERS.values():
            with tempfile.TemporaryDirectory() as folder:
                cells.append(outcome(read, case.make(Path(folder))) if case.kind in kinds else "")
        if cells[0] not in ("reads", "refuses") or (name in _SOUND and set(cells) - {"reads", ""}):
            sys.exit(f"{name}: {cells}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
