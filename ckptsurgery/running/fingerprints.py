"""What tells one run from another: its source's files, its steps, and the library that carries them out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import CheckpointError, Diagnostic
from ..planning.plan import Plan
from ..storage.checkpoint import Checkpoint
from ..storage.chunked_tensors import chunks_of
from ..storage.sources.byte_source import LocalFile

__all__ = ["fingerprint", "plan_digest"]


def plan_digest(plan: Plan) -> str:
    """Return a hash of all that a plan does, by which ranks agree that they carry out the same one.

    Object addresses in the text of an op are left out. The source's files are not looked at.
    """
    import hashlib

    digests: dict[int, str] = {}
    for step in plan.steps:
        if id(step.program) not in digests:
            digests[id(step.program)] = hashlib.sha256(_without_addresses(step.program)).hexdigest()
    steps = sorted((step.targets, step.sources, digests[id(step.program)]) for step in plan.steps)
    specs = sorted((key, str(spec)) for key, spec in plan.specs.items())
    inits = sorted((key, str(what)) for key, what in plan.inits.items())
    return hashlib.sha256(_without_addresses((steps, specs, inits, sorted(plan.ties.items())))).hexdigest()


def _without_addresses(value: object) -> bytes:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()


def fingerprint(
    plan: Plan, checkpoint: Checkpoint, aliases: Mapping[str, str], companions: Mapping[str, bytes] = {}
) -> str:
    """A tag of 16 hex digits: equal for two runs only when they would write the same bytes.

    A file is known by its path, size and time of change, not by its content.

    Raises:
        CheckpointError: the source is not in files alone, so nothing says whether it is the same the next time.
    """
    import hashlib

    if any(entry.file is None and not chunks_of(entry) for entry in checkpoint.entries.values()):
        raise CheckpointError(
            Diagnostic("not-resumable", "only what is read straight from files can be resumed", checkpoint.source,
                       help="save without resume")
        )  # fmt: skip
    digest = hashlib.sha256()
    for part in _parts(plan, checkpoint, aliases):
        digest.update(json.dumps(part, default=str).encode() + b"\n")
    for name, data in companions.items():
        digest.update(f"{name!r} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def _parts(plan: Plan, checkpoint: Checkpoint, aliases: Mapping[str, str]) -> Iterator[object]:
    for file in checkpoint.files:
        source = checkpoint.sources.get(file)
        if source is not None and not isinstance(source, LocalFile):
            yield [file, source.size, *map(str, source.identity)]
            continue
        status = Path(file).stat()
        yield [str(Path(file).absolute()), status.st_size, status.st_mtime_ns]
    yield [(key, str(entry.spec), entry.file, entry.offset) for key, entry in checkpoint.entries.items()]
    for key, entry in checkpoint.entries.items():
        if chunks := chunks_of(entry):
            yield [key, [(chunk.low, chunk.box.extent, chunk.place.file, chunk.place.offset) for chunk in chunks]]
    yield sorted(aliases.items())
    # Programs are shared by many steps, and long: each is spelled once.
    numbers: dict[int, int] = {}
    for step in plan.steps:
        if id(step.program) not in numbers:
            numbers[id(step.program)] = len(numbers)
            yield repr(step.program)
        yield [numbers[id(step.program)], step.sources, step.targets]
