"""A tqdm bar over bytes, on a terminal's stderr; silent and free of imports anywhere else."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

__all__ = ["ByteBar"]

_WORTH_SHOWING = 64 << 20


class ByteBar:
    """Counts bytes as work goes on.

    >>> with ByteBar(10, "writing") as bar:
    ...     bar(4)
    ...     bar(6)
    >>> bar.done
    10

    Args:
        total: bytes expected.
        title: what is going on.
        shown: True or False to insist; None shows a bar on a terminal when there is work enough to wait for.
    """

    def __init__(self, total: int, title: str, shown: bool | None = None) -> None:
        self.total, self.title, self.done = total, title, 0
        self.shown = shown if shown is not None else total >= _WORTH_SHOWING and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> ByteBar:
        if self.shown:
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, desc=self.title, unit="B", unit_scale=True, leave=False, file=sys.stderr)
        return self

    def __call__(self, nbytes: int) -> None:
        self.done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
