"""Pieces of work spread over the cores, side by side as long as what they hold together stays within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain, islice
from threading import Condition

from ...planning.costing import BUDGET, workers

__all__ = ["Moved", "Task", "run_tasks"]

Moved = Callable[[int], object]
"""Called with a number of bytes as they arrive; from any thread, one at a time."""


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work: the bytes that it holds while it runs, and what it does; it returns the bytes it wrote."""

    held: int
    run: Callable[[], int]


def run_tasks(tasks: Iterable[Task], moved: Moved, budget: int = BUDGET) -> None:
    """Run tasks over the cores; the first failure stops the rest, and is raised when nothing runs any more.

    Args:
        moved: called with what each task returns, from any thread, one at a time.
        budget: bytes that tasks may hold together; a single larger one runs alone.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    queue = _Queue(chain(first, tasks), moved, budget)
    if len(first) < 2:  # a thread would take longer to start than most single tasks take
        queue.work()
        return
    with ThreadPoolExecutor(workers(), thread_name_prefix="ckptsurgery") as pool:
        try:
            for thread in as_completed([pool.submit(queue.work) for _ in range(workers())]):
                thread.result()
        finally:
            queue.stop()


class _Queue:
    """Tasks for threads of which each takes the next one as soon as it is done with the last."""

    def __init__(self, tasks: Iterable[Task], moved: Moved, budget: int) -> None:
        self._tasks, self._moved, self._budget = iter(tasks), moved, budget
        self._next: Task | None = None
        self._held = 0
        self._stopped = False
        self._changed = Condition()

    def work(self) -> None:
        """Run tasks until there are no more, or one of them fails."""
        try:
            while (task := self._taken()) is not None:
                nbytes = task.run()
                with self._changed:
                    self._held -= task.held
                    self._changed.notify_all()
                    self._moved(nbytes)
        finally:
            self.stop()  # a task failed, or there are no more

    def stop(self) -> None:
        """Let nothing begin any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _taken(self) -> Task | None:
        """The next task, as soon as there is room for what it holds."""
        with self._changed:
            while not self._stopped:
                self._next = task = self._next or next(self._tasks, None)
                if task is None:
                    return None
                if not self._held or self._held + task.held <= self._budget:
                    self._next = None
                    self._held += task.held
                    return task
                self._changed.wait()
            return None
