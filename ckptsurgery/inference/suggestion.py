"""A suggestion: a recipe that was inferred, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic
from ..language.folding import fold
from ..language.recipe import Recipe
from ..notebook_view import TextInNotebooks
from ..wording import brief, counted
from .assumptions import Assumption
from .matches import Question

if TYPE_CHECKING:
    from .parity import Parity

__all__ = ["Suggestion"]


@dataclass(frozen=True, repr=False)
class Suggestion(TextInNotebooks):
    """An inferred recipe, with its coverage and its assumptions.

    Args:
        recipe: ready to plan; it makes what is sure, and leaves out what is not.
        coverage: the share of the target's keys that the recipe makes or ties.
        ambiguous: open questions, each with its candidates and the evidence for each.
        assumptions: what the headers cannot show.
        unmatched_source, unmatched_target: keys without a counterpart.
        evidence: `"names"` or `"values"`: what it was inferred from.
        problems: why none of the short recipes planned, where the recipe is the one of last resort, key by key.
        parity: the outputs of both models after a trial conversion, where they were run.
    """

    recipe: Recipe
    coverage: float
    ambiguous: tuple[Question, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    unmatched_source: tuple[str, ...] = ()
    unmatched_target: tuple[str, ...] = ()
    evidence: str = "names"
    problems: tuple[Diagnostic, ...] = field(default=(), repr=False)
    parity: Parity | None = None

    def __str__(self) -> str:
        lines = [
            str(self.recipe).rstrip(),
            "",
            f"# covers {self.coverage:.1%} of the target's keys, by {self.evidence}",
        ]
        for question in self.ambiguous:
            lines.append(f"# open: {question.target}: {question.said}")
        for assumption in self.assumptions:
            lines.append(f"# assumed ({assumption.kind}): {assumption.text}")
        for name, keys in (("source", self.unmatched_source), ("target", self.unmatched_target)):
            lines += [
                f"# no counterpart in the {'target' if name == 'source' else 'source'}: {text} ({n})"
                for text, n in fold(keys)
            ]
        if self.parity is not None:
            lines += [f"# tried: {line}" for line in str(self.parity).split("\n")]
        return "\n".join(lines)

    def __repr__(self) -> str:
        left = ((self.ambiguous, "open question"), (self.assumptions, "assumption"))
        lost = ((self.unmatched_source, "unmatched source key"), (self.unmatched_target, "unmatched target key"))
        counts = [counted(len(found), what) for found, what in (*left, *lost) if found]
        return brief("Suggestion", counted(len(self.recipe.rules), "rule"), f"covers {self.coverage:.1%}", *counts)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data; the recipe as text."""
        return {
            "recipe": str(self.recipe),
            "coverage": self.coverage,
            "evidence": self.evidence,
            "ambiguous": [
                {
                    "target": q.target,
                    "candidates": [
                        {"sources": list(c.sources), "score": c.score, "evidence": dict(c.evidence)}
                        for c in q.candidates
                    ],
                }
                for q in self.ambiguous
            ],
            "assumptions": [{"kind": a.kind, "text": a.text, "keys": list(a.keys)} for a in self.assumptions],
            "unmatched_source": list(self.unmatched_source),
            "unmatched_target": list(self.unmatched_target),
            "parity": None if self.parity is None else self.parity.to_json(),
        }
