"""Proving an output by reading it back: copies are compared byte for byte, what was computed is computed again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from ..errors import CheckpointError, Diagnostic
from ..language.folding import fold
from ..planning.costing import CHUNK
from ..planning.plan import Plan
from ..storage.checkpoint import Checkpoint
from ..storage.opening import open_checkpoint
from .executing import Loads, run_step
from .progress import ByteBar

__all__ = ["check_output"]

Read = Callable[[int, int], bytes | bytearray | memoryview]


def check_output(
    plan: Plan,
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    files: Iterable[str],
    aliases: Mapping[str, str],
    progress: bool | None = None,
) -> int:
    """Prove that a written checkpoint is what the plan makes of its source; the number of bytes compared.

    The files are dropped from the page cache first, where the system allows it, so that the disk answers. What only
    moves is computed as tensors here, which is not the way it was written.

    Args:
        files: what was written. aliases: names that share the tensor of another.

    Raises:
        CheckpointError: the output differs: in its keys, shapes, dtypes, ties or bytes; all of it at once.
    """
    _forget(files)
    with open_checkpoint(path) as written:
        problems = _headers(plan, written, aliases)
        if problems:
            raise CheckpointError(problems)
        total = sum(spec.nbytes for key, spec in plan.specs.items() if key not in aliases)
        with ByteBar(total, f"checking {Path(path).name}", progress) as bar:
            wrong = _differing(plan, checkpoint, written, aliases, bar)
    if wrong:
        raise CheckpointError(_problem("values-differ", "do not hold what the plan makes", wrong, str(path)))
    return bar.done


def _forget(files: Iterable[str]) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _headers(plan: Plan, written: Checkpoint, aliases: Mapping[str, str]) -> list[Diagnostic]:
    specs = {**plan.specs, **{alias: plan.specs[base] for alias, base in aliases.items()}}
    group = {name: number for number, tie in enumerate(written.ties) for name in tie.names}
    found = (
        ("keys-missing", "are not there", [k for k in specs if k not in written.specs]),
        ("keys-unexpected", "should not be there", [k for k in written.specs if k not in specs]),
        ("specs-differ", "have another shape or dtype", [k for k, s in specs.items() if written.specs.get(k, s) != s]),
        (
            "ties-lost",
            "are tied no more",
            [a for a, b in aliases.items() if specs[a].numel and group.get(a, a) != group.get(b, b)],
        ),
    )
    return [_problem(code, text, keys, written.source) for code, text, keys in found if keys]


def _problem(code: str, text: str, keys: list[str], path: str) -> Diagnostic:
    return Diagnostic(
        f"check-{code}",
        f"{len(keys)} keys of the output {text}",
        path,
        notes=tuple(t for t, _ in fold(keys)[:8]),
        help="do not use it: the disk or the memory is failing, or something else wrote to it",
    )


def _differing(
    plan: Plan,
    checkpoint: Checkpoint,
    written: Checkpoint,
    aliases: Mapping[str, str],
    compared: Callable[[int], object],
) -> list[str]:
    from ..storage.tensors import dense_bytes

    copied = [s for s in plan.steps if s.kind == "copy"]
    computed = [s for s in plan.steps if s.kind != "copy"]
    wrong = []
    for step in copied:
        for key, number in zip(step.targets, step.program.copies or ()):
            if key not in aliases and not _equal(
                written, key, partial(checkpoint.read, step.sources[number]), compared
            ):
                wrong.append(key)
    loads = Loads(checkpoint, computed)
    for step in computed:
        if not all(key in aliases for key in step.targets):
            for key, tensor in zip(step.targets, run_step(step, loads)):
                if key not in aliases and not _equal(written, key, partial(_part, dense_bytes(tensor, key)), compared):
                    wrong.append(key)
        loads.done(step)
    return wrong


def _part(data: memoryview, start: int, stop: int) -> memoryview:
    return data[start:stop]


def _equal(written: Checkpoint, key: str, expected: Read, compared: Callable[[int], object]) -> bool:
    total = written.specs[key].nbytes
    for start in range(0, total, CHUNK):
        stop = min(start + CHUNK, total)
        if memoryview(written.read(key, start, stop)) != memoryview(expected(start, stop)):
            return False
        compared(stop - start)
    return True
