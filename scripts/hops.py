"""Counts the functions and files of the package that a call runs through: `python scripts/hops.py [--list load_into]`.

A reader who follows a call has to open so many files. The calls are the plainest of their kind: a state dict of a small
model, in a safetensors file, renamed by one rule. Beside them stand two calls of other libraries, counted alike.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import ckptsurgery as cs

PACKAGE = str(Path(cs.__file__).parent)


class Counter:
    """Notes each function under one folder that runs while it is entered, on any thread, and how deep calls nest."""

    def __init__(self, root: str) -> None:
        self.root, self.seen, self.deepest = root, dict[CodeType, int](), 0
        self._depth = threading.local()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if not frame.f_code.co_filename.startswith(self.root):
            return
        depth = getattr(self._depth, "now", 0) + (event == "call") - (event == "return")
        self._depth.now = max(depth, 0)
        if event == "call":
            self.seen.setdefault(frame.f_code, len(self.seen))
            self.deepest = max(self.deepest, depth)

    def __enter__(self) -> Counter:
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    @property
    def functions(self) -> list[CodeType]:
        """The functions in the order of their first call; comprehensions and lambdas belong to the one around them."""
        return [code for code in self.seen if not code.co_name.startswith("<")]

    @property
    def files(self) -> set[str]:
        """The files that they are in."""
        return {code.co_filename for code in self.functions}


def model() -> nn.Module:
    """A small model with a tie, a buffer and a norm."""
    made = nn.Sequential(nn.Embedding(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 8, bias=False))
    made[2].weight = made[0].weight
    return made


def calls(folder: Path) -> dict[str, tuple[str, Callable[[], object]]]:
    """Name -> the folder whose functions count, and the call."""
    from torch.distributed import checkpoint as dcp

    path, rule = folder / "model.safetensors", "{k...} -> {k...}"
    cs.save(model(), path)
    dcp.save(model().state_dict(), checkpoint_id=folder / "dcp")
    plan, target = cs.plan(path, rule), model()
    return {
        "cs.open": (PACKAGE, lambda: cs.open(path)),
        "cs.plan": (PACKAGE, lambda: cs.plan(path, rule)),
        "plan.save": (PACKAGE, lambda: plan.save(folder / "out.safetensors", overwrite=True)),
        "cs.load_into": (PACKAGE, lambda: cs.load_into(target, path)),
        "torch dcp.load": (
            str(Path(torch.__file__).parent / "distributed" / "checkpoint"),
            lambda: dcp.load(model().state_dict(), checkpoint_id=folder / "dcp"),
        ),
    }


def main() -> None:
    """Print one line a call."""
    parser = argparse.ArgumentParser(description="Count the functions and files that a call runs through.")
    parser.add_argument("--list", metavar="CALL", help="also print the functions of one call, in order")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, (root, call) in calls(Path(folder)).items():
            call()  # imports and caches are not what a reader follows
            with Counter(root) as counter:
                call()
            functions, files = counter.functions, counter.files
            print(f"{name:15} {len(functions):4} functions {len(files):3} files, depth {counter.deepest}")
            if options.list and options.list in name:
                for code in functions:
                    print(f"    {Path(code.co_filename).relative_to(root)}:{code.co_firstlineno} {code.co_qualname}")


if __name__ == "__main__":
    main()
