"""`doctor`: everything that can be found out about a checkpoint's health, in one pass over its bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, Diagnostic
from ..notebook_view import TextInNotebooks
from ..running.progress import ByteBar
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from ..wording import brief, counted
from .conversions import conversions_of
from .file_checks import file_findings
from .headers import header_findings
from .values import ValueSurvey, value_findings

__all__ = ["Diagnosis", "doctor"]

_ORDER = ("error", "warning", "note")


@dataclass(frozen=True, slots=True, repr=False)
class Diagnosis(TextInNotebooks):
    """The findings of `doctor`, each with its place and a remedy.

    Args:
        source: what was looked at.
        findings: errors first, then warnings, then notes.
        tensors: how many tensors were looked at.
        bytes_read: how many bytes of them.
    """

    source: str
    findings: tuple[Diagnostic, ...]
    tensors: int = 0
    bytes_read: int = 0

    def of(self, severity: str) -> tuple[Diagnostic, ...]:
        """Return the findings of one severity: `"error"`, `"warning"` or `"note"`."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    @property
    def healthy(self) -> bool:
        """Whether there is no error among the findings."""
        return not self.of("error")

    def to_json(self) -> dict[str, object]:
        """Return the diagnosis as plain data."""
        return {
            "source": self.source,
            "healthy": self.healthy,
            "tensors": self.tensors,
            "bytes_read": self.bytes_read,
            "findings": [finding.to_json() for finding in self.findings],
        }

    def __str__(self) -> str:
        return self.text(str)

    def text(self, spell: Callable[[Diagnostic], str]) -> str:
        """Return the diagnosis on several lines, each finding as `spell` writes it."""
        looked = f"{counted(self.tensors, 'tensor')}, {self.bytes_read:,} bytes read"
        head = f"{self.source}: {looked}: {', '.join(self._counts())}"
        return "\n\n".join([head, *map(spell, self.findings)])

    def __repr__(self) -> str:
        return brief("Diagnosis", self.source, counted(self.tensors, "tensor"), *self._counts())

    def _counts(self) -> list[str]:
        return [counted(len(self.of(s)), s) for s in _ORDER if self.of(s)] or ["sound"]


def doctor(source: Any, subtree: str | None = None, *, values: bool = True, progress: bool | None = None) -> Diagnosis:
    """Check a checkpoint for problems: files, headers, ties, and every element.

    >>> import torch
    >>> found = doctor({"w": torch.tensor([1.0, float("nan")])})
    >>> found.healthy, [finding.code for finding in found.findings]
    (False, ['nan'])

    Memory does not grow with the checkpoint: values are read block by block. Nothing of the source is run or changed.

    Args:
        source: whatever `open` takes.
        subtree: where in a training checkpoint the tensors are.
        values: False looks at files and headers alone.
        progress: True or False to insist on a bar or on none.

    A checkpoint that cannot be opened is not an exception here: what is wrong with it is the diagnosis.
    """
    path = Path(source).expanduser() if isinstance(source, str | os.PathLike) else None
    found = file_findings(path) if path is not None and not str(source).startswith("hf://") else []
    try:
        checkpoint = open_checkpoint(source, subtree=subtree)
    except CheckpointError as error:
        name = str(source) if isinstance(source, str | os.PathLike) else type(source).__name__  # not its tensors
        return _diagnosis(name, [*error.diagnostics, *found])
    try:
        return _of(checkpoint, found, values, progress, None if path is None else str(source), subtree)
    finally:
        if checkpoint is not source:
            checkpoint.close()


def _of(
    checkpoint: Checkpoint,
    found: list[Diagnostic],
    values: bool,
    progress: bool | None,
    place: str | None,
    subtree: str | None,
) -> Diagnosis:
    found = [*found, *header_findings(checkpoint)]
    read = 0
    if values:
        with ByteBar(checkpoint.nbytes, f"examining {Path(checkpoint.source).name}", progress) as bar:
            survey = ValueSurvey()
            try:
                survey.take(checkpoint, bar)
                checkpoint.check_unchanged()
            except CheckpointError as error:
                found += error.diagnostics
            read = bar.done
        found += value_findings(survey, checkpoint)
    return _diagnosis(checkpoint.source, [*conversions_of(found, place, subtree)], len(checkpoint), read)


def _diagnosis(source: str, found: list[Diagnostic], tensors: int = 0, read: int = 0) -> Diagnosis:
    # What opening a broken folder and looking at its files both say is said once.
    once = list({(finding.code, finding.headline): finding for finding in found}.values())
    return Diagnosis(source, tuple(sorted(once, key=lambda finding: _ORDER.index(finding.severity))), tensors, read)
