"""The exception tree and the diagnostics it carries.

CkptSurgeryError
├── CheckpointError     a file or a state_dict cannot be read, written or trusted
├── RecipeError         a rule or a recipe does not parse, or contradicts itself
├── PlanError           recipe and headers do not fit together
└── LoadError           a model cannot take what the plan would give it
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["CheckpointError", "CkptSurgeryError", "Diagnostic", "LoadError", "PlanError", "RecipeError"]


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One problem: what, where, and the line that settles it.

    >>> print(Diagnostic("unexpected-keys", "1 source key matches no rule", notes=("x.inv_freq  F32 [64]",),
    ...                  help='drop = ["x.inv_freq"]'))
    error[unexpected-keys]: 1 source key matches no rule
       x.inv_freq  F32 [64]
     = help: drop = ["x.inv_freq"]

    Args:
        code: a short, stable name in kebab case.
        headline: the problem in one line, understandable alone.
        place: `file:line`, a file, or a key: where to look.
        notes: lines below the headline.
        facts: `(label, text)` pairs, such as `("reads", "q [4, 4]")`.
        help: a line to paste, or the argument that settles it.
        severity: `"error"` stops the plan, `"warning"` and `"note"` do not.
    """

    code: str
    headline: str
    place: str | None = None
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    help: str | None = None
    severity: str = "error"

    def __post_init__(self) -> None:
        # Names and shapes come from files, and may be as long as the file.
        object.__setattr__(self, "headline", _clipped(self.headline))
        object.__setattr__(self, "notes", tuple(map(_clipped, self.notes)))
        if self.help is not None:
            object.__setattr__(self, "help", _clipped(self.help, 5 * _LONGEST))

    def __str__(self) -> str:
        lines = [f"{self.severity}[{self.code}]: {self.headline}"]
        if self.place:
            lines.append(f"  --> {self.place}")
        lines += [f"   {note}" for note in self.notes]
        lines += [f" = {label}: {text}" for label, text in self.facts]
        if self.help:
            lines.append(f" = help: {self.help}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """The diagnostic as plain data."""
        return {
            "severity": self.severity,
            "code": self.code,
            "headline": self.headline,
            "place": self.place,
            "notes": list(self.notes),
            "facts": dict(self.facts),
            "help": self.help,
        }


_LONGEST = 4000  # characters of a headline or a note


def _clipped(text: str, most: int = _LONGEST) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 4 :]}"


class CkptSurgeryError(Exception):
    """Base of every error of this library; `.diagnostics` holds all problems found, not the first alone.

    >>> error = CkptSurgeryError(Diagnostic("missing-file", "no such file: 'a.safetensors'"))
    >>> error.diagnostics[0].code
    'missing-file'
    """

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]) -> None:
        found = (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = found
        super().__init__("\n\n".join(str(d) for d in found))


class CheckpointError(CkptSurgeryError):
    """A file or a state_dict cannot be read, written or trusted."""


class RecipeError(CkptSurgeryError):
    """A rule or a recipe does not parse, or contradicts itself."""


class PlanError(CkptSurgeryError):
    """A recipe and the headers it was planned against do not fit together."""


class LoadError(CkptSurgeryError):
    """A model cannot take what it would be given.

    After an I/O failure in the middle of a copy, `.written` names the target keys that already hold new values and
    `.untouched` those that do not.
    """

    def __init__(
        self,
        diagnostics: Diagnostic | Iterable[Diagnostic],
        written: Sequence[str] = (),
        untouched: Sequence[str] = (),
    ) -> None:
        super().__init__(diagnostics)
        self.written = tuple(written)
        self.untouched = tuple(untouched)
