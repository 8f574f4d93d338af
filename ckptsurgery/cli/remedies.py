"""Remedies in the words of the command line: options to append, with the quotes that a shell wants."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import Diagnostic, Remedy, sentence
from ..toml_writing import entry_text

__all__ = ["in_options", "shell_help", "shell_text"]

_OPTIONS = {
    "dims": "--dim",
    "max_shard_size": "--max-shard-size",
    "max_memory": "--max-memory",
    "rules": "--rule",
    "by_file": "--by-file",
    "in_place": "--in-place",
}


def shell_text(diagnostic: Diagnostic, options: Collection[str]) -> str:
    """A diagnostic as a command prints it; remedies that none of its options can express are left out.

    >>> told = Diagnostic("no-size", "no size", remedies=(Remedy("dims", {"h": None}), Remedy("assign", True)))
    >>> print(shell_text(told, {"--dim", "--drop"}))
    error[no-size]: no size
     = help: --dim h=…

    Args:
        options: the options of the command that failed, such as `"--drop"`.
    """
    return diagnostic.text(_ways(diagnostic, options))


def shell_help(diagnostic: Diagnostic, options: Collection[str]) -> str | None:
    """The help of a diagnostic in the options of the command that failed; None where these settle nothing."""
    return sentence(_ways(diagnostic, options)) or None


def _ways(diagnostic: Diagnostic, options: Collection[str]) -> list[str]:
    if not diagnostic.remedies and not diagnostic.advice:
        return [diagnostic.help] if diagnostic.help else []
    spelled = (_spelled(remedy, options) for remedy in diagnostic.remedies)
    return [text for text in (*spelled, diagnostic.advice) if text]


def in_options(warnings: Iterable[Diagnostic], options: Collection[str]) -> tuple[Diagnostic, ...]:
    """Return warnings whose help is spelled in options of the command that shows them.

    >>> warning = Diagnostic("bare", "bare", remedies=(Remedy("template", None),), severity="warning")
    >>> in_options([warning], {"--template"})[0].help
    '--template …'
    """
    return tuple(replace(one, help=shell_help(one, options) or "") for one in warnings)


def _spelled(remedy: Remedy, options: Collection[str]) -> str | None:
    if remedy.kind == "instead":
        return str(remedy)
    if remedy.kind == "convert":
        return f"{_conversion(dict(remedy.value))} {remedy.effect}".strip()
    if remedy.kind == "before":
        return None
    if remedy.argument in ("source", "path"):
        return f"{_quoted(remedy.value)} {remedy.effect}".strip()
    option = _option(remedy.argument)
    contrary = option if remedy.value is False else f"--no-{option[2:]}"
    if isinstance(remedy.value, bool) and contrary in options:
        return f"without {contrary} {remedy.effect}".strip()
    if remedy.argument == "recipe" and isinstance(remedy.value, Mapping):
        return f"{' '.join(w for k, v in remedy.value.items() for w in _words(_option(k), v))} {remedy.effect}".strip()
    if option in options:
        return f"{' '.join(_words(option, remedy.value))} {remedy.effect}".strip()
    if remedy.kind == "recipe" and "--recipe" in options:
        return (
            f"{entry_text(remedy.argument, remedy.value)} in {remedy.place or 'a recipe file'} {remedy.effect}".strip()
        )
    return None


def _option(argument: str) -> str:
    return _OPTIONS.get(argument, f"--{argument.replace('_', '-')}")


def _words(option: str, value: Any) -> Iterator[str]:
    """The option once for each of its values.

    >>> list(_words("--dim", {"h": 8, "rows": {"q": 2, "k": None}}))
    ['--dim h=8', '--dim rows.q=2', '--dim rows.k=…']
    """
    if value is True:
        yield option
    elif isinstance(value, Mapping):
        for name, one in value.items():
            pairs = {f"{name}.{c}": v for c, v in one.items()} if isinstance(one, Mapping) else {name: one}
            yield from (f"{option} {_quoted(f'{key}={_plain(v)}')}" for key, v in pairs.items())
    elif isinstance(value, list | tuple):
        yield from (f"{option} {_quoted(one)}" for one in value)
    else:
        yield f"{option} {_quoted(value)}"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_plain, value))
    return "…" if value is None else value if isinstance(value, str) else json.dumps(value)


def _quoted(value: Any) -> str:
    text = _plain(value)
    known = text.replace("…", "")
    return text if known in ("", shlex.quote(known)) else shlex.quote(text)


def _conversion(given: dict[str, Any]) -> str:
    places = [_quoted(given.pop("source")), _quoted(given.pop("destination", None))]
    return " ".join(["ckptsurgery convert", *places, *(w for k, v in given.items() for w in _words(_option(k), v))])
