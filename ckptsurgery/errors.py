"""The exception tree and the diagnostics it carries.

CkptSurgeryError
├── CheckpointError     a file or a state_dict cannot be read, written or trusted
├── RecipeError         a rule or a recipe does not parse, or contradicts itself
├── PlanError           recipe and headers do not fit together
└── LoadError           a model cannot take what the plan would give it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .toml_writing import entry_text

__all__ = ["CheckpointError", "CkptSurgeryError", "Diagnostic", "LoadError", "PlanError", "RecipeError", "Remedy"]

RemedyKind = Literal["argument", "recipe", "instead", "before", "convert"]


@dataclass(frozen=True, slots=True)
class Remedy:
    """A way to settle a problem, as data: an argument and its value.

    A face spells it in its own language: `str()` in Python or, where it belongs in a recipe file, in TOML; the command
    line by its options.

    >>> remedy = Remedy("drop", ["x.{i}"], "leaves it out")
    >>> str(remedy), remedy.to_json()["value"]
    ('drop=["x.{i}"] leaves it out', ['x.{i}'])
    >>> str(Remedy("dims", {"h": None}))
    'dims={"h": …}'
    >>> print(Remedy("init", {"fc.{l}": "zeros"}, kind="recipe", place="mine.toml"))
    init = { "fc.{l}" = "zeros" } in mine.toml
    >>> str(Remedy("drop", {"w.x": "w.y"}, kind="instead"))
    "did you mean 'w.y'?"

    Args:
        argument: the name of an argument, or of a part of a recipe.
        value: strings, numbers, lists, mappings; None in the place of a value that only the caller knows.
        effect: the rest of a sentence that begins with the argument: "leaves it out".
        kind: `"argument"`: an argument of the call that failed. `"recipe"`: an entry to add to the recipe.
            `"instead"`: `{wrong: right}` or `{wrong: [right, …]}`, a text to replace in that argument or part.
            `"before"`: a Python expression to run before the call. `"convert"`: the arguments of a conversion.
        place: the recipe's file, where it has one.
    """

    argument: str
    value: Any = field(hash=False)
    effect: str = ""
    kind: RemedyKind = "argument"
    place: str | None = None

    @property
    def complete(self) -> bool:
        """Whether no value is left to the caller."""
        return not _has_blank(self.value)

    @classmethod
    def size(cls, name: str) -> Remedy:
        """Return the remedy for a size that nothing determines."""
        return cls("dims", {name: None}, kind="recipe")

    def within(self, place: str | None) -> Remedy:
        """Return the remedy for a recipe that was read from `place`."""
        return replace(self, place=place) if self.kind in ("recipe", "instead") and self.place is None else self

    def __str__(self) -> str:
        return f"{self._spelled()} {self.effect}".strip()

    def _spelled(self) -> str:
        if self.kind == "instead":
            return self.instead()
        if self.kind == "before":
            return f"{self.value} first"
        if self.kind == "convert":
            return _conversion(dict(self.value))
        if self.argument == "recipe" and isinstance(self.value, Mapping):
            return f"recipe=cs.Recipe({', '.join(f'{k}={literal(v)}' for k, v in self.value.items())})"
        if self.kind == "recipe" and self.place is not None:
            return f"{entry_text(self.argument, self.value)} in {self.place}"
        if self.kind == "recipe" and self.argument != "dims":  # `plan` takes dims as well
            return f"{self.argument} = {literal(self.value)} in the recipe"
        return f"{self.argument}={literal(self.value)}"

    def instead(self) -> str:
        """Return the texts that were probably meant: a question, unless `effect` makes it a sentence."""
        meant = [right for rights in self.value.values() for right in ([rights] if isinstance(rights, str) else rights)]
        if self.effect:
            return " or ".join(map(literal, dict.fromkeys(meant)))
        return f"did you mean {' or '.join(map(repr, dict.fromkeys(meant)))}?"

    def to_json(self) -> dict[str, Any]:
        """Return the remedy as plain data."""
        return {"argument": self.argument, "value": self.value, "kind": self.kind, "effect": self.effect}


def literal(value: Any) -> str:
    r"""Plain data as Python, strings in double quotes as TOML takes them too; `…` for a value that the caller gives.

    >>> literal({"h": [1, None], "x": True, "odd": "\x7f"})
    '{"h": [1, …], "x": True, "odd": "\\u007f"}'
    """
    if value is None:
        return "…"
    if isinstance(value, str):
        spelled = json.dumps(value, ensure_ascii=False)
        return spelled if spelled.isprintable() else "".join(map(_visible, spelled))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    return str(value)


def _visible(letter: str) -> str:
    return (
        letter if letter.isprintable() else f"\\u{ord(letter):04x}" if letter <= "\uffff" else f"\\U{ord(letter):08x}"
    )


def _conversion(given: dict[str, Any]) -> str:
    source, destination = given.pop("source"), given.pop("destination", None)
    parts = {k: given.pop(k) for k in ("rules", "drop", "tie") if k in given}
    saved = [f"{k}={literal(given.pop(k))}" for k in ("overwrite", "companions") if k in given]
    recipe = ", ".join([*(f"{k}={literal(v)}" for k, v in parts.items()), 'rest="keep"'])
    opened = [f"{k}={literal(given.pop(k))}" for k in ("subtree", "by_file") if k in given]
    place = f"cs.open({', '.join([literal(source), *opened])})" if opened else literal(source)
    planned = ", ".join([place, f"cs.Recipe({recipe})", *(f"{k}={literal(v)}" for k, v in given.items())])
    return f"cs.plan({planned}).save({', '.join([literal(destination), *saved])})"


def _has_blank(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_blank, value.values()))
    return value is None or (isinstance(value, list | tuple) and any(map(_has_blank, value)))


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """A problem, its place, and the line that settles it.

    >>> print(Diagnostic("unexpected-keys", "1 source key matches no rule", notes=("x.inv_freq  F32 [64]",),
    ...                  remedies=(Remedy("drop", ["x.inv_freq"], "leaves it out"),), advice="or correct the rule"))
    error[unexpected-keys]: 1 source key matches no rule
       x.inv_freq  F32 [64]
     = help: drop=["x.inv_freq"] leaves it out, or correct the rule

    Args:
        code: a short, stable name in kebab case.
        headline: the problem in one line, understandable alone.
        place: `file:line`, a file, or a key: where to look.
        notes: lines below the headline.
        facts: `(label, text)` pairs, such as `("reads", "q [4, 4]")`.
        help: a sentence to follow. Where it is not given, it is composed of `remedies`, in Python, and `advice`.
        severity: `"error"` stops the plan, `"warning"` and `"note"` do not.
        remedies: what settles it, each by itself, as data.
        advice: a sentence that goes with the remedies in every language.
    """

    code: str
    headline: str
    place: str | None = None
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    help: str | None = None
    severity: str = "error"
    remedies: tuple[Remedy, ...] = ()
    advice: str | None = None

    def __post_init__(self) -> None:
        if self.help is None and (self.remedies or self.advice):
            object.__setattr__(self, "help", sentence(self._composed()))
        # Names and shapes come from files, and may be as long as the file.
        object.__setattr__(self, "headline", _clipped(self.headline))
        object.__setattr__(self, "notes", tuple(map(_clipped, self.notes)))
        if self.help is not None:
            object.__setattr__(self, "help", _clipped(self.help, 5 * _LONGEST))

    def _composed(self) -> tuple[str, ...]:
        return (*map(str, self.remedies), *([self.advice] if self.advice else ()))

    @property
    def ways(self) -> tuple[str, ...]:
        """The parts of the help: each remedy, in Python, and the advice; or the one sentence that was given."""
        composed = self._composed()
        return composed if self.help == sentence(composed) else (self.help,) if self.help else ()

    def within(self, place: str | None) -> Diagnostic:
        """Return the diagnostic with remedies for a recipe that was read from `place`."""
        if place is None or not self.remedies:
            return self
        return replace(self, remedies=tuple(r.within(place) for r in self.remedies), help=None)

    def __str__(self) -> str:
        return self.text(self.ways)

    def text(self, ways: Sequence[str]) -> str:
        """Return the diagnostic on several lines; a long help takes a line for each of its `ways`."""
        lines = [f"{self.severity}[{self.code}]: {self.headline}"]
        if self.place:
            lines.append(f"  --> {self.place}")
        lines += [f"   {note}" for note in self.notes]
        lines += [f" = {label}: {text}" for label, text in self.facts]
        if help := sentence(ways):
            lines.append(" = help: " + (help if len(help) <= _LINE else sentence(ways, ",\n         ")))
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Return the diagnostic as plain data."""
        return {
            "severity": self.severity,
            "code": self.code,
            "headline": self.headline,
            "place": self.place,
            "notes": list(self.notes),
            "facts": dict(self.facts),
            "help": self.help,
            "remedies": [remedy.to_json() for remedy in self.remedies],
        }


_LINE = 110  # characters of a help that is printed on one line
_LONGEST = 4000  # characters of a headline or a note


def sentence(ways: Sequence[str], between: str = ", ") -> str:
    """Join the ways of a help; a question needs no comma behind it, and the first way no "or".

    >>> sentence(["did you mean 'a'?", "or add a rule"])
    "did you mean 'a'? or add a rule"
    """
    return between.join(ways).replace(f"?{between}", f"?{between.removeprefix(',')}").removeprefix("or ")


def _clipped(text: str, most: int = _LONGEST) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 4 :]}"


class CkptSurgeryError(Exception):
    """Base of every error of this library; `.diagnostics` holds all problems that were found.

    >>> error = CkptSurgeryError(Diagnostic("missing-file", "no such file: 'a.safetensors'"))
    >>> error.diagnostics[0].code
    'missing-file'
    """

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]) -> None:
        found = (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = found
        super().__init__("\n\n".join(str(d) for d in found))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the diagnostics, not the message that is made of them: errors go from process to process."""
        return type(self), (self.diagnostics,), self.__dict__

    def rewrite(self, each: Callable[[Diagnostic], Diagnostic]) -> None:
        """Replace every diagnostic by what `each` makes of it, in the message too."""
        self.diagnostics = tuple(map(each, self.diagnostics))
        self.args = ("\n\n".join(map(str, self.diagnostics)),)


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
