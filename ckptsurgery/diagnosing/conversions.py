"""Conversions that settle a finding: arguments of a conversion, of the checkpoint that is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from ..errors import Diagnostic, Remedy

__all__ = ["conversion", "conversions_of"]


def conversion(effect: str, source: str | None = None, destination: str | None = None, **options: Any) -> Remedy:
    """Return the remedy that converts a checkpoint.

    >>> print(conversion("casts all", "a.safetensors", "b.safetensors", dtype="bf16"))
    cs.plan("a.safetensors", cs.Recipe(rest="keep"), dtype="bf16").save("b.safetensors") casts all

    Args:
        effect: the rest of a sentence that begins with the command.
        source: a path; by default the one that is looked at, which `conversions_of` fills in.
        destination: a path; by default it is left to the caller.
        options: arguments of the plan, of its recipe and of saving.
    """
    return Remedy("convert", {"source": source, "destination": destination, **options}, effect, kind="convert")


def conversions_of(findings: Iterable[Diagnostic], source: str | None, subtree: str | None) -> Iterator[Diagnostic]:
    """Yield the findings, with conversions of this source where a remedy names none."""
    given = {"source": source} | ({"subtree": subtree} if subtree else {})
    for finding in findings:
        remedies = tuple(
            replace(r, value={**r.value, **given}) if r.kind == "convert" and r.value["source"] is None else r
            for r in finding.remedies
        )
        yield finding if remedies == finding.remedies else replace(finding, remedies=remedies, help=None)
