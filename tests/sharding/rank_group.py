"""A group of processes that a test session launches once: each call of a function runs on all ranks.

A process takes two seconds to import torch, so that the cases share them. What a function returns on each rank comes
back; an exception of any rank comes back as text.
"""

from __future__ import annotations

import importlib
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TIMEOUT = 120  # seconds that a collective waits for the other ranks


class RankError(Exception):
    """A rank raised; the text is its traceback."""


class Group:
    """Processes of one gloo group."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._folder = tempfile.TemporaryDirectory()
        here = Path(__file__).parent
        paths = [str(here.parent.parent), str(here), os.environ.get("PYTHONPATH", "")]
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        shared |= {"WORLD_SIZE": str(ranks), "STORE": str(Path(self._folder.name, "store"))}
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__))],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on each rank.

        Args:
            function: of a test module, which the processes import by its name.
        """
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        task = pickle.dumps((test, function.__module__.rpartition(".")[2], function.__name__, args))
        for process in self._processes:
            assert process.stdin
            process.stdin.write(struct.pack("<Q", len(task)) + task)
            process.stdin.flush()
        answers = [_received(process.stdout) for process in self._processes]
        failed = [text for fine, text in answers if not fine]
        if failed:
            raise RankError("\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            if process.stdin:
                process.stdin.close()
        for process in self._processes:
            process.wait(timeout=60)
            if process.stdout:
                process.stdout.close()
        self._folder.cleanup()


def _received(pipe: Any) -> Any:
    head = pipe.read(8)
    if len(head) < 8:
        return False, "the process is gone"
    return pickle.loads(pipe.read(struct.unpack("<Q", head)[0]))


def work() -> None:
    """Run what comes through the standard input, until it is closed."""
    tasks, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a case prints is no answer
    import warnings
    from datetime import timedelta

    import torch.distributed as dist

    warnings.simplefilter("ignore")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["STORE"], size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=_TIMEOUT))
    while len(head := tasks.read(8)) == 8:
        test, module, name, args = pickle.loads(tasks.read(struct.unpack("<Q", head)[0]))
        if "coverage" in sys.modules:  # the suite is measured: what runs from here on is this test's
            sys.modules["coverage"].Coverage.current().switch_context(test)
        try:
            answer: tuple[bool, Any] = True, getattr(importlib.import_module(module), name)(*args)
        except Exception:
            answer = False, f"rank {rank}: {traceback.format_exc()}"
        data = pickle.dumps(answer)
        answers.write(struct.pack("<Q", len(data)) + data)
        answers.flush()
    os._exit(0)  # taking the group down takes longer than the cases


if __name__ == "__main__":
    work()
