"""Carrying a plan out on the file that it reads: only names and shapes change, so only the header is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import Diagnostic, PlanError
from ..language.folding import fold
from ..narrowing import present
from ..planning.plan import Plan
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.output.header_swap import fitted_header, refuse_shared, replace_header
from ..wording import counted

__all__ = ["change_in_place"]


def change_in_place(
    plan: Plan,
    checkpoint: Checkpoint,
    path: Path,
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    dry_run: bool = False,
) -> tuple[int, str]:
    """Give a file the header that the plan asks for: the bytes written, and a word on the old header.

    Raises:
        PlanError: the plan does more than give other names and shapes to all tensors of one safetensors file.
        CheckpointError: the file has other names on the disk, or the new header has no room.
    """
    _refuse(plan, checkpoint, path)
    refuse_shared(path)
    places: dict[str, tuple[TensorSpec, int]] = {}
    for step in plan.steps:
        for key, number, spec in zip(step.targets, step.program.copies or (), step.program.outputs):
            extent = present(checkpoint.extent(step.sources[number]), "the place of a tensor in its file")
            if key not in aliases:
                places[key] = spec, extent.offset
    header = fitted_header(path, places, metadata, aliases)
    if dry_run:
        return len(header), "a dry run: the header has room, and was not written"
    backup = replace_header(path, header, places)
    restored = "`ckptsurgery restore-header` puts it back"
    return len(header), f"changed in place: the old header lies in {str(backup)!r}, {restored}"


def _refuse(plan: Plan, checkpoint: Checkpoint, path: Path) -> None:
    """All that keeps a plan from being a change of the header alone."""
    problems = []

    def refuse(code: str, headline: str, notes: list[str]) -> None:
        text = f"not changed in place: {headline}"
        problems.append(Diagnostic(code, text, str(path), tuple(notes[:8]), help="write a new file instead"))

    files = checkpoint.files
    if path.suffix != ".safetensors" or len(files) != 1:
        what = f"{len(files)} files are read" if len(files) != 1 else "it is no safetensors file"
        refuse("in-place-format", f"{what}, and one safetensors file alone can be", list(files))
    elif not path.exists() or not path.samefile(files[0]):
        refuse("in-place-other", f"it is not the file that is read, {files[0]!r}", [])
    more = [key for step in plan.steps if step.kind != "copy" for key in step.targets]
    more += [k for s in plan.steps if s.kind == "copy" for k in s.sources if checkpoint.extent(k) is None]
    if more:
        taken = f"{counted(len(more), 'tensor', 'takes')} more than a name or a shape"
        refuse("in-place-bytes", taken, [t for t, _ in fold(more)])
    kept = {checkpoint.extent(key) for step in plan.steps for key in step.sources}
    gone = [key for key in plan.dropped if checkpoint.extent(key) not in kept and checkpoint.specs[key].nbytes]
    if gone:
        left = f"the bytes of {counted(len(gone), 'dropped tensor')} would stay"
        refuse("in-place-drop", left, [t for t, _ in fold(gone)])
    if problems:
        raise PlanError(problems)
